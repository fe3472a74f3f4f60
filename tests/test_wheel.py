"""The built distributions, and confsteer as it is installed from them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT


def build(source: Path, target: str, folder: Path) -> Path:
    """The wheel or sdist of `source`, with no environment of its own: hatchling is all it takes."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder], cwd=source, check=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_the_package_and_what_it_needs_to_run(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "confsteer"
    modules = {str(file.relative_to(ROOT)) for file in package.rglob("*.py")}
    model = {str(file.relative_to(ROOT)) for file in (package / "demo" / "model").iterdir()}
    profiles = {f"confsteer/{file.relative_to(ROOT)}" for file in (ROOT / "calibrations").rglob("*") if file.is_file()}
    others = {"calibration/published.json", "demo/unigram.npy", "playground/page.html", "py.typed", "report/page.html.j2"}
    assert "confsteer/demo/model/model.safetensors" in model
    assert "confsteer/calibrations/confsteer-demo/profile.json" in profiles
    assert names == modules | model | profiles | {f"confsteer/{name}" for name in others}


def test_an_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not any("__pycache__" in name for name in archive.getnames())
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel", tmp_path / "wheel")
    assert again.name == wheel.name
    assert zipfile.ZipFile(again).testzip() is None
    first, second = ({info.filename: info.CRC for info in zipfile.ZipFile(file).infolist()} for file in (wheel, again))
    assert first == second


COMMANDS = """
import confsteer
from confsteer.cli import main

assert confsteer.__file__.startswith({site!r}), confsteer.__file__
for command in (
    ["show", "confsteer-demo"],
    ["scan"],
    ["generate", "It was the best of times", "-p", "confsteer-demo", "-s", "entropy=+0.3", "--max-new-tokens", "2"],
):
    main(command, standalone_mode=False)
"""


def test_what_a_wheel_installs_works_anywhere(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*command: str | Path) -> str:
        return subprocess.run(command, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True).stdout

    assert run(site / "bin" / "confsteer", "--version").startswith("confsteer, version ")
    printed = run(sys.executable, "-c", COMMANDS.format(site=str(site)))
    for sentence in ("Entropy neurons", "Profile of the weights written", "entropy=+0.3"):
        assert sentence in printed
