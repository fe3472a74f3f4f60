from __future__ import annotations

import importlib.metadata
import os
import pickle
import subprocess
import sys

import pdoc.doc
import pytest
from click.testing import CliRunner

import confsteer
from confsteer import errors
from confsteer.cli import main


def test_every_public_name_is_there_and_no_other() -> None:
    assert confsteer.__all__ == sorted(confsteer.__all__) == dir(confsteer)
    for name in set(confsteer.__all__) - {"demo"}:
        assert getattr(confsteer, name).__module__ == "confsteer"
        assert getattr(confsteer, name).__name__ == name
        assert pickle.loads(pickle.dumps(getattr(confsteer, name))) is getattr(confsteer, name)
    assert confsteer.__version__ == importlib.metadata.version("confsteer")
    with pytest.raises(AttributeError, match="no attribute 'calibration_'"):
        _ = confsteer.calibration_


def test_every_error_is_a_confsteer_error_and_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for name, value in vars(errors).items():
        if isinstance(value, type):
            assert issubclass(value, errors.ConfsteerError)
            assert name in errors.__doc__
            assert name in confsteer.__all__


def test_the_demonstration_needs_no_second_import() -> None:
    code = "import sys, confsteer; assert 'torch' not in sys.modules; print(confsteer.demo.load().profile.model.id)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "confsteer-demo\n"


def test_an_error_goes_by_the_name_that_users_import() -> None:
    code = "from confsteer.steering import Steering; Steering.parse('entropy')"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("confsteer.SteeringError: ")


def test_importing_confsteer_is_light() -> None:
    heavy = ("torch", "transformers", "pydantic", "vllm", "matplotlib", "torchmetrics", "datasets", "peft")
    code = (
        "import sys, confsteer, confsteer.runtimes.vllm\n"
        f"loaded = [module for module in {heavy} if module in sys.modules]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words", "answers"),
    [
        (["--help"], None, ["Exit codes"]),
        (["--version"], None, [importlib.metadata.version("confsteer")]),
        (["calibrate", "--help"], None, ["--unigram"]),
        ([], "confsteer ge", ["plain,generate"]),
        ([], "confsteer show conf", ["dir,conf", "plain,confsteer-demo"]),
        ([], "confsteer generate Once -s e", ["plain,entropy=+0.2", "plain,entropy=-0.2"]),
    ],
)
def test_help_version_and_completion_are_light(arguments: list[str], words: str | None, answers: list[str]) -> None:
    code = (
        "import atexit, sys; from confsteer.cli import main; heavy = {'torch', 'transformers', 'numpy'}\n"
        "atexit.register(lambda: print('loaded', heavy & sys.modules.keys())); main(prog_name='confsteer')"
    )
    environment = dict(os.environ)
    if words is not None:
        environment |= {"_CONFSTEER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-c", code, *arguments]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    for answer in answers:
        assert answer in printed
    assert printed.endswith("loaded set()\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_gets_its_completion(shell: str) -> None:
    """As in the README: ``_CONFSTEER_COMPLETE=bash_source confsteer``."""
    result = CliRunner().invoke(main, [], prog_name="confsteer", env={"_CONFSTEER_COMPLETE": f"{shell}_source"})
    assert result.exit_code == 0
    assert f"_CONFSTEER_COMPLETE={shell}_complete" in result.output


def test_every_public_name_is_in_the_reference() -> None:
    for name in confsteer.__all__:
        getattr(confsteer, name)  # pdoc looks at what has been imported
    module = pdoc.doc.Module(confsteer)
    reference = {**module.members, **{entry.name: entry for entry in module.submodules}}
    assert sorted(reference) == confsteer.__all__
    for name, entry in reference.items():
        assert entry.docstring, name
