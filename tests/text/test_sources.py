from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from confsteer import CorpusError
from confsteer.text import sources
from confsteer.text.sources import python_docs, read_dataset, read_texts
from tests.paths import SHARED

CORPORA = SHARED / "corpora"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(file: Path, content: Any) -> Path:
    """Text, bytes, a list of records (one per line for ``.jsonl``), gzipped if the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        lines = ".jsonl" in file.name or ".ndjson" in file.name
        content = "".join(json.dumps(record) + "\n" for record in content) if lines else json.dumps(content)
    data = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(gzip.compress(data) if file.name.endswith(".gz") else data)
    return file


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", "one\r\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a", "\ufeffno suffix", ["no suffix"]),
        ("a.TXT.GZ", gzip.compress(b"one", mtime=0), ["one"]),
        ("a.txt.gz", "one", ["one"]),
        ("a.json", ["one", {"text": "two", "other": 1}, ""], ["one", "two", ""]),
        ("a.json.gz", ["one", "two"], ["one", "two"]),
        ("a.jsonl", '{"text": "one\\u2028"}\n\n  \n"two"', ["one\u2028", "two"]),
        ("a.ndjson", [{"text": "zwei\u2028drei"}], ["zwei\u2028drei"]),
        ("a.jsonl.gz", [{"text": "one"}, "two"], ["one", "two"]),
    ],
)
def test_files_are_read_by_what_their_name_says(tmp_path: Path, name: str, content: Any, documents: list[str]) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        write(file, content)
    assert list(read_texts([file])) == documents


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_larger_than_a_document_is_read_in_parts(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {i} é\n" * (i % 3) for i in range(200)]
    file = write(tmp_path / name, "".join(lines))
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 150)
    with pytest.raises(CorpusError, match="cut it into several"):
        list(read_texts(file))
    parts = [str(part) for part in read_texts(file, in_parts=True)]
    assert "".join(parts) == "".join(lines)
    assert all(part.endswith("é\n") and len(part) > 50 for part in parts[:-1])
    assert len(parts) > 10
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 105)
    with pytest.raises(CorpusError, match=r"part \d has more than 105 bytes"):
        list(read_texts(file, in_parts=True))


def test_a_field_may_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert list(read_texts([file], field="body")) == ["yes"]


def test_a_folder_is_its_files_in_order_without_hidden_and_others(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.txt.gz", "c.jsonl", ".hidden.txt", ".git/x.txt", "picture.png", "a/model.bin", "d.csv"):
        write(tmp_path / name, '"c"' if name == "c.jsonl" else name)
    assert list(read_texts([tmp_path])) == ["a/b.txt.gz", "a/z.md", "b.txt", "c"]
    assert list(read_texts([tmp_path / "b.txt", tmp_path / "a"])) == ["b.txt", "a/b.txt.gz", "a/z.md"]


def test_no_more_lines_are_read_than_asked_for(tmp_path: Path) -> None:
    """Where the reading stops, what comes after does not matter: a line that is wrong, a gzip file that is cut short."""
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(100_000))
    plain = write(tmp_path / "a.jsonl", lines + "wrong")
    compressed = write(tmp_path / "a.jsonl.gz", lines)
    compressed.write_bytes(compressed.read_bytes()[:-100])
    for file in (plain, compressed):
        documents = read_texts([file])
        assert [next(documents) for _ in range(3)] == ["line 0", "line 1", "line 2"]
        with pytest.raises(CorpusError):
            list(documents)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", " \n", "a.txt has no text"),
        ("a.txt", b"t1 \xff\xfe", "a.txt is not UTF-8 text (byte 3 is not valid)"),
        ("a.jsonl", "\n", "a.jsonl has no text"),
        ("a.json", [], "a.json has no text"),
        ("a.jsonl", b'"ok"\n"\xff"\n', "a.jsonl, line 2 is not UTF-8 text (byte 1"),
        ("a.jsonl", '"ok"\n\n{"text":\n', "a.jsonl, line 3 is not JSON"),
        (
            "a.json",
            '{"text": "one"}\n{"text": "two"}',
            "a.json is not JSON: Extra data: line 2 column 1 (char 16); if it has one",
        ),
        ("a.json", '["one",\n two]', "a.json is not JSON: Expecting value: line 2 column 2"),
        ("a.json", "[" * 100_000, "a.json is not JSON that can be read"),
        ("a.json", '{"text": "one"}', "a.json is an object, not a list of documents"),
        ("a.json", [{"body": "x", "id": 1}], "a.json, item 1 has no field 'text'; it has 'body', 'id'"),
        ("a.jsonl", ["x", {}], "a.jsonl, line 2 has no field 'text'; it has none"),
        ("a.jsonl", [{"text": None}], "a.jsonl, line 1, field 'text' is null, not a string"),
        ("a.jsonl", [{"text": ["x"]}], "a.jsonl, line 1, field 'text' is a list, not a string"),
        ("a.jsonl", [3], "a.jsonl, line 1 is a number, not a string"),
        ("a.jsonl", [TURNS], "a.jsonl, line 1 is a list, not a string"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_place(tmp_path: Path, name: str, content: Any, sentence: str) -> None:
    documents = read_texts([write(tmp_path / name, content)])
    with pytest.raises(CorpusError) as error:
        list(documents)
    assert str(tmp_path) in str(error.value)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "content", [b"plain text", gzip.compress(b"text " * 1000, mtime=0)[:-20], gzip.compress(b"text", mtime=0)[:12] + b"\xff" * 30]
)
def test_what_is_no_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.txt\.gz is not a sound gzip file"):
        list(read_texts([tmp_path / "a.txt.gz"]))


def test_what_is_missing_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", "text")
    with pytest.raises(CorpusError, match=r"none\.txt: No such file"):
        read_texts([good, tmp_path / "none.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"empty has no file that ends in \.txt, \.md, \.json, \.jsonl, \.ndjson"):
        read_texts([good, tmp_path / "empty"])
    with pytest.raises(CorpusError, match=r"good\.txt: conversations are read from \.json, \.jsonl, \.ndjson"):
        read_texts([good], chat=True)


def test_conversations(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"messages": TURNS}, TURNS])
    write(tmp_path / "b.json", [TURNS])
    write(tmp_path / "c.txt", "no conversation")
    assert list(read_texts([tmp_path], chat=True)) == [TURNS, TURNS, TURNS]
    write(tmp_path / "a.jsonl", [{"turns": TURNS}])
    assert list(read_texts([tmp_path / "a.jsonl"], field="turns", chat=True)) == [TURNS]


@pytest.mark.parametrize("record", ["text", [], ["Hi"], [{"from": "human", "value": "Hi"}], {"messages": "Hi"}, 3])
def test_what_is_no_conversation_is_named(tmp_path: Path, record: Any) -> None:
    with pytest.raises(CorpusError, match=r"line 2.* is not a list of messages with 'role' and 'content'"):
        list(read_texts([write(tmp_path / "a.jsonl", [TURNS, record])], chat=True))


@pytest.mark.parametrize(("content", "sentence"), [([{"type": "audio"}], "type 'audio'"), (3, "is a number")])
def test_content_that_is_no_text_is_named_with_its_line(tmp_path: Path, content: Any, sentence: str) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": None}]
    file = write(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": [*turns, {"role": "user", "content": content}]}])
    with pytest.raises(CorpusError, match=rf"line 2, field 'messages': .*message 3.*{sentence}"):
        list(read_texts([file], chat=True))


def test_null_records_are_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="line 2, field 'text' is null, not a string: leave records without text out"):
        list(read_texts([write(tmp_path / "a.jsonl", ["one", {"text": None}])]))


def test_a_dataset_is_streamed_by_split_and_field(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    write(tmp_path / "validation.jsonl", [{"text": "three", "n": 3}])
    name = str(tmp_path)
    assert list(read_dataset(name)) == ["one", "two"]
    assert list(read_dataset(name, split="validation", field="text")) == ["three"]
    assert list(read_dataset(name, config="default")) == ["one", "two"]
    with pytest.raises(CorpusError, match=r"split 'nope'.*train.*validation"):
        read_dataset(name, split="nope")
    with pytest.raises(CorpusError, match="'nope' not found"):
        read_dataset(name, config="nope")
    with pytest.raises(CorpusError, match="record 1 has no field 'body'; it has 'text', 'n'"):
        next(read_dataset(name, field="body"))
    with pytest.raises(CorpusError, match="record 1, field 'n' is a number, not a string"):
        next(read_dataset(name, field="n"))
    with pytest.raises(CorpusError, match="cannot load dataset"):
        read_dataset(name + "/nothing")


def test_a_dataset_of_conversations(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"messages": TURNS}])
    assert list(read_dataset(str(tmp_path), chat=True)) == [TURNS]


def test_a_dataset_that_breaks_off_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "one"}\n{"te')
    with pytest.raises(CorpusError, match="cannot read dataset"):
        list(read_dataset(str(tmp_path)))


def test_the_demonstrations_text_has_two_disjoint_halves() -> None:
    def paragraphs(documents: list[str]) -> set[str]:
        return {p.strip() for document in documents for p in document.split("\n\n") if len(p) >= 60}

    calibration, held_out = python_docs("calibration"), python_docs("held-out")
    assert not paragraphs(calibration) & paragraphs(held_out)
    assert min(sum(map(len, calibration)), sum(map(len, held_out))) > 100_000


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora are not here")
def test_public_corpora_as_they_are() -> None:
    questions = list(read_texts([CORPORA / "agieval" / "aqua-rat.jsonl"], field="question"))
    assert len(questions) == len((CORPORA / "agieval" / "aqua-rat.jsonl").read_bytes().splitlines())
    with pytest.raises(CorpusError, match=r"aqua-rat\.jsonl, line 1, field 'passage' is null"):
        next(read_texts([CORPORA / "agieval" / "aqua-rat.jsonl"], field="passage"))
    with pytest.raises(CorpusError, match="line 1 has no field 'text'; it has 'passage', 'question'"):
        next(read_texts([CORPORA / "agieval"]))
    assert len(list(read_texts([CORPORA / "tinystories"]))) == 1000
