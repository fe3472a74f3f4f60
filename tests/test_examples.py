"""What the README and the examples say runs as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from confsteer import Profile, Steering
from confsteer.runtimes.vllm.settings import Settings
from confsteer.text.sources import python_docs
from tests.paths import ROOT
from tests.planted import output_weights, planted


def run(example: str, *arguments: object, folder: Path) -> str:
    """What an example prints, run as a user does, in a folder of its own."""
    command = [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than a few steps
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model on disk with its profile, and documents that it wrote with more entropy than it has."""
    root = tmp_path_factory.mktemp("examples")
    planted("llama").save(root)
    config = root / "model" / "config.json"
    # Positions are rotations: it can read as far as one likes.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    (root / "texts.json").write_text(json.dumps(output_weights(Steering(entropy=0.6))))
    return root


def test_steer(tmp_path: Path) -> None:
    printed = run("steer.py", folder=tmp_path)
    assert re.findall(r"(\S+): '", printed) == ["entropy=-0.15", "neutral", "entropy=+0.3"]


def test_own_model(folder: Path) -> None:
    printed = run("own_model.py", folder / "model", folder / "texts.json", folder=folder)
    assert printed.count("entropy=") >= 2
    assert Profile.load(folder / "own.confsteer").entropy_neurons


def test_tune(folder: Path) -> None:
    run("tune.py", folder / "model", folder / "profile", folder / "tuned", folder / "texts.json", folder=folder)
    assert "calibrated" in Profile.load(folder / "tuned").presets


def test_train_demo_model(tmp_path: Path) -> None:
    (tmp_path / "read.txt").write_text("\n\n".join(python_docs("calibration")))
    (tmp_path / "unseen.txt").write_text("\n\n".join(python_docs("held-out")))
    books = ("--books", tmp_path, "--held-out", "unseen.txt")
    run("train_demo_model.py", *books, "--out", "out", "--steps", 1, "--log-every", 1, folder=tmp_path)
    (row,) = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert row["step"] == 1
    weight = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert not weight[:, -8:].any(), "the null space is given"


@pytest.mark.parametrize("page", ["README.md", "docs/steering.md"])
def test_the_python_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 1
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, page, "exec"), names)
        assert isinstance(names["profile"], Profile)


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"](docs/{page.name})" in readme, page.name
    for link in re.findall(r"\]\((?!https:)([^)#]+)", readme):
        assert (ROOT / link).exists(), link


def test_kubernetes_yaml_names_settings_that_exist() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "examples" / "kubernetes.md").read_text(), re.DOTALL | re.MULTILINE)
    (deployment,) = (yaml.safe_load(block) for block in blocks)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    _, option, value = container["args"]
    assert option == "--additional-config"
    settings = Settings.of(json.loads(value))
    assert settings is not None
    Steering.parse(settings.default)
    assert {variable["name"] for variable in container["env"]} == {"VLLM_PLUGINS"}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["port"] == container["ports"][0]["containerPort"]
