"""The order of the rooms: imports point one way, and the mathematics knows of tensors alone."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import confsteer

PACKAGE = Path(confsteer.__file__).parent
ROOMS = (
    "errors",
    "defaults",
    "files",
    "steering",
    "distributed",
    "bars",
    "results",
    "last_layer",
    "text",
    "discovery",
    "model",
    "profile",
    "demo",
    "playground",
    "calibration",
    "runtimes",
    "studies",
    "evaluation",
    "tuning",
    "report",
    "cli",
    "__main__",
)
"""From the bottom up: a room imports what stands before it. `confsteer` itself, the face, imports all and may be imported by
the last."""
MODULES = sorted(PACKAGE.rglob("*.py"))
FACE = PACKAGE / "__init__.py"


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(file) for file in MODULES}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; a name taken from a package counts as its module, where it is one."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in NAMES else node.module


def room(module: str) -> str:
    """The room a module of confsteer is in, or the module itself if it is in none."""
    return module.split(".")[1] if "." in module else "the face"


@pytest.mark.parametrize("folder", sorted({file.parent for file in MODULES} - {PACKAGE}), ids=lambda folder: folder.name)
def test_a_room_lists_its_modules(folder: Path) -> None:
    said = "".join((place / "__init__.py").read_text(encoding="utf-8") for place in (folder, folder.parent) if place != PACKAGE)
    listed = set(re.findall(r"(\w+\.py)(?=[ ,])", said))
    assert {file.name for file in folder.glob("*.py")} - {"__init__.py"} <= listed


def test_the_rooms_are_these() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ROOMS)
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("file", [file for file in MODULES if file != FACE], ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    own = room(name_of(file))
    allowed = {own, *ROOMS[: ROOMS.index(own)]}
    if own in ("cli", "__main__"):
        allowed.add("the face")
    taken = {room(module) for module in imports(file) if module.split(".")[0] == "confsteer"}
    assert taken <= allowed


def test_no_module_imports_itself_by_way_of_others() -> None:
    arrows = {name_of(file): {m for m in imports(file) if m in NAMES} for file in MODULES if file != FACE}
    settled: set[str] = set()
    while free := {module for module, targets in arrows.items() if module not in settled and targets - {"confsteer"} <= settled}:
        settled |= free
    assert settled == arrows.keys()


@pytest.mark.parametrize(
    ("place", "others"),
    [
        ("last_layer", {"errors"}),
        ("discovery", {"errors", "last_layer"}),
    ],
)
def test_the_mathematics_knows_of_tensors_alone(place: str, others: set[str]) -> None:
    """No models, no files, no schemas: what these rooms compute can be checked on paper."""
    for file in (PACKAGE / place).glob("*.py"):
        for module in imports(file):
            package, *_ = module.split(".")
            if package == "confsteer":
                assert room(module) in {place, *others}, file
            else:
                assert package not in {"transformers", "pydantic", "safetensors", "pathlib", "os", "io", "json", "tqdm"}, file


def test_the_two_processes_of_vllm_share_no_arrow() -> None:
    vllm = PACKAGE / "runtimes" / "vllm"
    for own, other in (("front", "worker"), ("worker", "front")):
        for file in (vllm / own).glob("*.py"):
            assert not [module for module in imports(file) if module.startswith(f"confsteer.runtimes.vllm.{other}")], file
    for file in vllm.glob("*.py"):
        taken = {module for module in imports(file) if module.startswith("confsteer.runtimes.vllm.worker")}
        assert not taken, f"{file.name} is for both processes"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of a function without docstrings, comments and blank lines."""
    prose: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    numbers = range(function.lineno, (function.end_lineno or 0) + 1)
    return sum(n not in prose and lines[n - 1].strip() != "" and not lines[n - 1].strip().startswith("#") for n in numbers)


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_functions_are_short_and_take_few_arguments(file: Path) -> None:
    """`calibrate` alone takes more: it is the one call that a user makes with all its settings."""
    text = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node, text.splitlines()) <= 60, f"{file}: {node.name}"
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            number = sum(arg is not None and arg.arg not in ("self", "cls") for arg in args)
            assert number <= 8 or (name_of(file), node.name) == ("confsteer.calibration.calibrate", "calibrate"), node.name


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Every docstring of a file, those of fields and constants too, with its line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def sentences(docstring: str) -> Iterator[str]:
    """The sentences of a docstring, cut at colons and semicolons too. Tables, trees and the lines of examples are left out."""
    for paragraph in re.split(r"\n\s*\n|\n\s*[-*|] |\n\s*(?=\w+: )", inspect.cleandoc(docstring)):
        if "\b" not in paragraph and not re.search(r"\S {2,}\S", paragraph):
            yield from re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_docstrings_start_with_a_verb_or_a_noun(file: Path) -> None:
    for line, docstring in docstrings(file):
        assert docstring.split(" ", 1)[0] not in ("Of", "What", "Which"), f"{file}:{line}"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_a_docstring_s_sentences_are_short(file: Path) -> None:
    for line, docstring in docstrings(file):
        for sentence in sentences(docstring):
            assert len(sentence.split()) <= 25, f"{file}:{line}: {sentence}"


def test_sentences_are_found() -> None:
    text = "One two. Three: four\n    five.\n\n    file.py    a table\n\n    \b\n    an example\n\n    - six; seven\n    - eight"
    assert list(sentences(text)) == ["One two.", "Three:", "four five.", "- six;", "seven", "eight"]
