"""Profiles from people who mean harm: whatever is in the folder, a profile is loaded or refused with a sentence."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from confsteer import Profile, ProfileCorruptError, ProfileError, ProfileNotFoundError, Steering, SteeringError
from confsteer.profile.store import FILE_NAME, FORMAT_VERSIONS, MEASURED_COLUMNS, WEIGHT_COLUMNS
from confsteer.report.columns import TableConsole
from confsteer.report.tables import print_profile
from confsteer.steering import DIALS
from tests.planted import planted

BATCHES, CASES = 10, 1_000
MOST_MEMORY = 1_000_000_000


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Within the context this process gets no more than `MOST_MEMORY` beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Saved(NamedTuple):
    """The files of a profile."""

    content: bytes
    """Of ``profile.json``."""
    columns: bytes


def save(folder: Path) -> Saved:
    found = planted("gpt2").profile.with_preset("calm", Steering(entropy=0.05, clamp={5: (None, 2.0)}))
    fields = {name: getattr(found, name) for name in Profile.model_fields if name != "columns_file"}
    # No more columns than there must be: ten thousand are read.
    columns = {name: found.columns[name] for name in (*WEIGHT_COLUMNS, *MEASURED_COLUMNS)}
    profile = Profile.create(columns=columns, **fields)
    profile.save(folder)
    return Saved((folder / FILE_NAME).read_bytes(), (folder / profile.columns_file.file).read_bytes())


def literal(text: str) -> str:
    """What `written` writes as it stands, though it is no JSON."""
    return f"literal {text.encode().hex()}"


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**300, 10**400, -(10**1000), 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, 1.0,
    literal("NaN"), literal("Infinity"), literal("-Infinity"), literal("1e999"), literal("1" * 5000), literal("1" * 4000),
    literal('"\\ud800"'), literal("[" * 5000), literal('{"a":' * 3000 + "1" + "}" * 3000), literal("1 2"), literal(""),
    literal('{"a": 1, "a": 2}'), "", "x", "0" * 64, "\x00", "\x1b]0;owned\x07", "[red]x[/red]", "[/]", "$\\frac$", "é" * 3,
    "../../../etc/passwd", "/etc/passwd", "columns-../../../x.safetensors", "columns-000000000000.safetensors\n", "a" * 10_000,
    [], [[]], {}, [None], [0, 1], [0.0, 1.0], {"": ""}, {"0": 0}, {"entropy": 1e6}, {"9" * 100: 1.0}, "entropy", "unigram",
]  # fmt: skip


DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "I64": 8, "U64": 8, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "C64": 8, "F4": 0.5}
"""Bytes of each."""


def written(value: Any) -> str:
    """As JSON, but for what is `literal`."""
    return re.sub('"literal ([0-9a-f]*)"', lambda found: bytes.fromhex(found[1]).decode(), json.dumps(value))


def somewhere(chance: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container in a JSON document and a key of it, as likely near the root as deep inside."""
    while True:
        key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        inside = tree[key]
        if not isinstance(inside, dict | list) or not inside or chance.random() < 0.3:
            return tree, key
        tree = inside


def mutate_tree(chance: random.Random, tree: Any, times: int) -> None:
    """Change, drop, add, double, rename, reorder things in a JSON document."""
    for _ in range(times):
        container, key = somewhere(chance, tree)
        what = chance.randrange(8)
        if what < 4:
            old = container[key]
            number = isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300
            container[key] = (
                chance.choice([old * 1e300, -old, old + 1, old * 1000, old / 3, int(old)])
                if number and chance.random() < 0.5
                else copy.deepcopy(chance.choice(NASTY))
            )
        elif what == 4:
            del container[key]
        elif what == 5 and isinstance(container, dict):
            name = chance.choice(["x", "", "\x1b[2J", "5", "entropy", "a" * 300, literal(written(key))])
            container[name] = copy.deepcopy(chance.choice([container[key], *NASTY]))
        elif what == 6 and isinstance(container, dict):
            items = list(container.items())
            chance.shuffle(items)
            container.clear()
            container.update(items)
        elif isinstance(container, list):
            container.insert(chance.randrange(len(container) + 1), copy.deepcopy(container[key]))


def mutate_bytes(chance: random.Random, content: bytes, times: int) -> bytes:
    changed = bytearray(content)
    for _ in range(times):
        place, size = chance.randrange(len(changed) + 1), chance.choice([1, 1, 2, 8, 100])
        what = chance.randrange(5)
        if what == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif what == 1:
            del changed[place : place + size]
        elif what == 2:
            changed[place:place] = chance.randbytes(size)
        elif what == 3:
            changed[place:place] = changed[place : place + size]
        elif chance.random() < 0.2:
            del changed[place:]
    return bytes(changed)


def mutate_columns(chance: random.Random, columns: bytes) -> bytes:
    """The safetensors file with another header, or other numbers."""
    (size,) = struct.unpack("<Q", columns[:8])
    header, data = json.loads(columns[8 : 8 + size]), columns[8 + size :]
    kind = chance.randrange(6)
    if kind == 0:
        mutate_tree(chance, header, chance.choice([1, 2, 5]))
    else:
        name = chance.choice([name for name in header if name != "__metadata__"])
        column = header[name]
        start, end = column["data_offsets"]
        if kind == 1:
            column["dtype"], size = chance.choice(list(DTYPES.items()))
            column["shape"] = [int((end - start) / size)]
        elif kind == 2:
            column["shape"] = chance.choice(
                [[], [1], [2**62, 4], [2**31, 2**31], [-1], [0, 2**60], [2, column["shape"][0] // 2], [1e3]]
            )
        elif kind == 3:
            column["data_offsets"] = chance.choice(
                [[end, start], [start, 2**40], [0, 2**63], [-8, end], [start, end - 8], [0, 0]]
            )
        elif kind == 4:
            del header[name]
            data = data[:start] + data[end:]
            for other in header.values():
                if other.get("data_offsets", [0])[0] >= end:
                    other["data_offsets"] = [offset - (end - start) for offset in other["data_offsets"]]
        else:
            values = np.frombuffer(data[start:end]).copy()
            values[chance.randrange(len(values))] = chance.choice([np.nan, np.inf, -np.inf, 1e308, -1.0, 0.0])
            data = data[:start] + values.tobytes() + data[end:]
    text = written(header).encode()
    size = len(text) if chance.random() < 0.9 else chance.choice([0, 2**30, 2**63, 2**64 - 1, len(text) - 1, len(text) + 100])
    return struct.pack("<Q", size) + text + data


def with_checksum(document: dict[str, Any]) -> str:
    """The document as JSON with the checksum that it should have; whatever it has, where it cannot be read back."""
    content = written(document)
    with contextlib.suppress(ValueError, RecursionError):
        rest = {name: value for name, value in json.loads(content).items() if name not in ("format_version", "checksum")}
        canonical = json.dumps([FORMAT_VERSIONS[0], rest], sort_keys=True, separators=(",", ":"))
        content = written(document | {"checksum": hashlib.sha256(canonical.encode()).hexdigest()})
    return content


def mutate(chance: random.Random, found: Saved, folder: Path) -> None:
    """Write a damaged profile into the folder."""
    kind = chance.randrange(8)
    if kind < 4:
        document = json.loads(found.content)
        mutate_tree(chance, document, chance.choice([1, 1, 2, 4]))
        payload = (with_checksum(document) if kind < 3 else written(document)).encode()
    elif kind < 6:
        payload = mutate_bytes(chance, found.content, chance.choice([1, 1, 3]))
    else:
        columns = mutate_bytes(chance, found.columns, 2) if chance.random() < 0.2 else mutate_columns(chance, found.columns)
        digest = hashlib.sha256(columns).hexdigest()
        file = {"file": f"columns-{digest[:12]}.safetensors", "sha256": digest}
        (folder / file["file"]).write_bytes(columns)
        payload = with_checksum(json.loads(found.content) | {"columns_file": file}).encode()
    (folder / FILE_NAME).write_bytes(payload)


def use(profile: Profile, *, printed: bool) -> None:
    """What is loaded can be shown, and steers by finite numbers or says why not."""
    if printed:
        print_profile(TableConsole(file=io.StringIO(), width=150), profile)
    for dial in DIALS:
        if profile.neurons(dial):
            for change in profile.reach(dial):
                with contextlib.suppress(SteeringError):
                    edit = profile.edit(Steering.parse({dial: change}))
                    assert np.isfinite(edit.gain).all()
                    assert np.isfinite(edit.bias).all()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_damaged_profile_is_a_valid_one_or_a_sentence(batch: int, tmp_path: Path) -> None:
    found = save(tmp_path)
    refused = 0
    for case in range(batch * CASES, (batch + 1) * CASES):
        mutate(random.Random(case), found, tmp_path)
        try:
            with little_memory():
                profile = Profile.load(tmp_path)
        except ProfileError as error:
            refused += 1
            assert str(error)
        else:
            # To print takes longer than all the rest.
            use(profile, printed=case % 10 == 0)
    assert 0 < refused < CASES, "some changes hurt, some do not"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(entropy_neurons=[{}] * 110_000), "entropy_neurons.0.layer: Field required"),
        (lambda d: d["response"]["entropy"].update(loss=[None] * 70_000), "response.entropy.loss.0: Input should be a valid"),
        (lambda d: d.update(presets={f"{i:x}": {} for i in range(40_000)}), "40000 presets; a profile has at most 100"),
        (lambda d: d.update(presets={"a": {"scale": dict.fromkeys(map(str, range(20_000)), "")}}), "20,000 neurons are named"),
        (lambda d: d.update({f"{i:x}": 0 for i in range(40_000)}), "Extra inputs are not permitted"),
        (lambda d: d.update(seed=[[]] * 100_000), "seed: Input should be a valid integer"),
        (lambda d: d.update(seed="x" * 600_000), "profile.json: it has more than 500,000 bytes"),
    ],
)
def test_a_long_profile_needs_little_memory(tmp_path: Path, change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    """However many things are wrong with it, one is named."""
    document = json.loads(save(tmp_path).content)
    change(document)
    (tmp_path / FILE_NAME).write_text(json.dumps(json.loads(with_checksum(document)), separators=(",", ":")))
    with little_memory(), pytest.raises(ProfileError) as error:
        Profile.load(tmp_path)
    assert sentence in str(error.value)


def swap(file: Path, how: str) -> None:
    """Put something else in the place of a file."""
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "endless":
        file.symlink_to("/dev/zero")
    elif how == "loop":
        file.symlink_to(file)
    else:
        with file.open("wb") as stream:
            stream.truncate(2 * MOST_MEMORY)


@pytest.mark.parametrize("how", ["folder", "pipe", "endless", "loop", "long"])
def test_what_is_no_file_is_not_read(tmp_path: Path, how: str) -> None:
    found = save(tmp_path)
    (columns,) = tmp_path.glob("columns-*")
    swap(columns, how)
    with little_memory(), pytest.raises(ProfileCorruptError, match=f"cannot read {columns}, which the profile names: "):
        Profile.load(tmp_path)
    assert found.content == (tmp_path / FILE_NAME).read_bytes()
    swap(tmp_path / FILE_NAME, how)
    with little_memory(), pytest.raises(ProfileNotFoundError, match=r"cannot read|has no profile\.json"):
        Profile.load(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 5000, "a/b..c", "-a/b-", "\x00", "", "a\nb/c", "é/é", "~/x", "a//b"])
def test_a_name_that_is_no_name_is_a_sentence(name: str) -> None:
    with pytest.raises(ProfileNotFoundError):
        Profile.load(name)


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    found = save(tmp_path / "p")
    document = json.loads(found.content)
    (tmp_path / document["columns_file"]["file"]).write_bytes(found.columns)
    for name in (f"../{document['columns_file']['file']}", str(tmp_path / document["columns_file"]["file"]), "..", "\0"):
        document["columns_file"]["file"] = name
        (tmp_path / "p" / FILE_NAME).write_text(with_checksum(document))
        with pytest.raises(ProfileCorruptError, match=r"columns_file\.file: String should match"):
            Profile.load(tmp_path / "p")
