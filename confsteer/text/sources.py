"""Sources of documents: files and folders, datasets, the Python documentation."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from confsteer.errors import CorpusError
from confsteer.files import MAX_DOCUMENT_BYTES
from confsteer.text.images import place_images, with_images, without_images
from confsteer.text.windows import Document, Windows, json_kind, make_windows, message_texts

FilePath = str | os.PathLike[str]

TEXT_SUFFIXES = (".txt", ".md")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json", *JSON_LINES_SUFFIXES)
DEFAULT_SPLIT = "train"
PART_BYTES = 10_000_000
"""Bytes after which a long text file is cut at the next end of a line, if it may be read in parts."""
SHORT_PARAGRAPH = 60
"""Characters below which a repeated paragraph counts as a phrase, such as "Example:"."""


class TextSource(BaseModel):
    """Source of a text, in the words of the command line's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    """Name in reports. None: it is made from the other fields."""
    text: tuple[Path, ...] = ()
    """Files and folders, see `read_texts`."""
    bundled: Literal["calibration", "held-out"] | None = None
    """Half of the Python documentation, in place of files; see `python_docs`."""
    dataset: str | None = None
    """A dataset, in place of files; see `read_dataset`."""
    config: str | None = None
    split: str | None = None
    field: str | None = None
    """Field of a JSON object that holds the text."""
    chat: bool = False
    """Whether documents are conversations."""
    join: bool = False
    """Whether windows may cross documents."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> TextSource:
        if sum(map(bool, (self.text, self.dataset, self.bundled))) != 1:
            raise ValueError("a text is files (text), a dataset, or bundled: give one of them")
        if not self.dataset and (self.config or self.split):
            raise ValueError("config and split go with a dataset")
        return self

    @property
    def title(self) -> str:
        """Take its name, or make one from the source."""
        if self.name:
            return self.name
        if self.dataset:
            where = f"dataset {dataset_title(self.dataset, self.config, self.split)}"
        elif self.bundled:
            where = f"Python documentation ({self.bundled} half)"
        else:
            where = ", ".join(path.name or str(path) for path in self.text)
        # Replace what is not UTF-8: a file may have any name.
        return where.encode(errors="replace").decode() + (" (conversations)" if self.chat else "")

    def documents(self, *, in_parts: bool = False) -> Iterable[Document]:
        """Read its documents. For `in_parts` see `read_texts`.

        Raises:
            CorpusError: see `read_texts` and `read_dataset`.
        """
        if self.bundled:
            return python_docs(self.bundled)
        if self.dataset:
            split = self.split or DEFAULT_SPLIT
            return read_dataset(self.dataset, config=self.config, split=split, field=self.field, chat=self.chat)
        return read_texts(self.text, field=self.field, chat=self.chat, in_parts=in_parts)

    def windows(
        self,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        tokens: int | None,
        load_processor: Callable[[], ProcessorMixin] | None = None,
    ) -> Windows:
        """Cut it into windows; see `confsteer.text.windows.make_windows`.

        Args:
            tokenizer: the model's tokenizer.
            window: tokens per window.
            tokens: number of tokens to read at most; all if None.
            load_processor: function that is called if a conversation has an image. Without one images are refused.
        """
        documents = self.documents()
        return make_windows(
            documents if load_processor is None else with_images(documents, load_processor),
            tokenizer,
            window=window,
            max_tokens=tokens,
            cross_documents=self.join,
            source=self.title,
        )


def dataset_title(dataset: str, config: str | None, split: str | None) -> str:
    """Name a dataset as the hub does. Name one in a local folder without its path, which is private."""
    called = Path(dataset).resolve().name if Path(dataset).exists() else dataset
    return " ".join(filter(None, [called, config, split or DEFAULT_SPLIT]))


def by_title(sources: Sequence[TextSource]) -> dict[str, TextSource]:
    """Give texts by their names in reports.

    Raises:
        CorpusError: two have the same title.
    """
    titles = [source.title for source in sources]
    if len(set(titles)) < len(titles):
        raise CorpusError(f"two texts are called {max(titles, key=titles.count)!r}, and reports go by names: rename one")
    return dict(zip(titles, sources, strict=True))


def read_texts(
    paths: FilePath | Sequence[FilePath], *, field: str | None = None, chat: bool = False, in_parts: bool = False
) -> Iterator[Document]:
    """Read the documents of UTF-8 files and folders, one at a time.

    ``.json`` holds a list of documents, and ``.jsonl`` or ``.ndjson`` one per line. A document is a string, or in a chat a list
    of messages, or an object that has it in `field`. Any other file is one document. All of them may be gzipped (``.gz``). A
    folder is read with all that is below it, in the order of the paths: files with these endings, ``.txt`` and ``.md``. Hidden
    files and folders are left out.

    Args:
        paths: files and folders, or one of them.
        field: field of an object that holds its document. None: ``text``, or ``messages`` for a chat.
        chat: whether documents are conversations.
        in_parts: whether a long text file is read as several documents, which end where lines do. Then its size has no bound.

    Raises:
        CorpusError: at once if a path is missing or a device, or a folder has no such file. While reading: if a file is not what
            its name says, or has no document. Also if a document has more than `MAX_DOCUMENT_BYTES` (a list in ``.json`` counts
            as one), or a record has no such field.
    """
    found = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if chat:
        files = _record_files(found, "conversations", JSON_SUFFIXES)
    else:
        files = [file for path in found for file in _files(path, (*TEXT_SUFFIXES, *JSON_SUFFIXES))]
    return (
        _document(record, where, field, chat) for file in files for where, record in _read_file(file, "text", in_parts=in_parts)
    )


def read_dataset(
    name: str, *, config: str | None = None, split: str = DEFAULT_SPLIT, field: str | None = None, chat: bool = False
) -> Iterator[Document]:
    """Read documents from a dataset on the hub or in a local folder, streamed.

    Args:
        name: hub id or folder.
        config: the dataset's configuration, if it has several.
        split: name of the split.
        field: name of the column. None: ``text``, or ``messages`` for a chat.
        chat: whether documents are conversations.

    Raises:
        CorpusError: at once if there is no such dataset, configuration or split. While reading: if a record has no such field,
            or cannot be read.
    """
    found = read_dataset_records(name, config=config, split=split)
    return (_document(record, where, field, chat) for where, record in found)


def read_dataset_records(name: str, *, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Read records from a dataset, streamed, each with its place; see `read_dataset`."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds: not found, offline, no such split
        raise CorpusError(f"cannot load dataset {name!r}, split {split!r}: {error}") from error

    def records() -> Iterator[Any]:
        try:
            yield from dataset
        except Exception as error:  # as many kinds: the network, the format of a file
            raise CorpusError(f"cannot read dataset {name!r}, split {split!r}: {error}") from error

    return ((f"dataset {name!r}, record {number}", record) for number, record in enumerate(records(), start=1))


def read_records(paths: Sequence[Path], what: str, suffixes: Sequence[str] = JSON_SUFFIXES) -> Iterator[tuple[str, Any]]:
    """Read the records of JSON files and folders, one at a time, each with its file and line.

    Args:
        paths: files and folders, as for `read_texts`.
        what: plural name of the records, for messages.
        suffixes: suffixes of the files that may hold them. A file that is not JSON is one record, its text.

    Raises:
        CorpusError: see `read_texts`.
    """
    return (record for file in _record_files(paths, what, suffixes) for record in _read_file(file, what))


def python_docs(part: Literal["calibration", "held-out"]) -> list[str]:
    """Read half of the language reference that ships with CPython (`pydoc_data.topics`), one document per topic.

    It is English prose that is on every machine, and serves as the text of the demonstration. Its topics go to the two parts in
    turn. Topics repeat each other, so a paragraph stays only where it comes first. The parts then share no text beyond short
    phrases.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].split("\n\n") if len(p) < SHORT_PARAGRAPH or p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        documents.append("\n\n".join(paragraphs))
    return documents[0 if part == "calibration" else 1 :: 2]


def _files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the path itself, or the files below it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):  # a pipe, such as a shell's <(zcat …)
        return [path]
    if not stat.S_ISDIR(mode):
        raise CorpusError(f"{path} is a device or a socket, neither a file nor a folder: write what it gives to a file")
    below = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in suffixes)
    files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise CorpusError(f"{path} has no file that ends in {', '.join(suffixes)} (or .gz of these)")
    return files


def _record_files(paths: Sequence[Path], what: str, suffixes: Sequence[str]) -> list[Path]:
    files = [file for path in paths for file in _files(path, suffixes)]
    for file in files:
        if _suffix(file) not in suffixes:
            raise CorpusError(f"{file}: {what} are read from {', '.join(suffixes)} (or .gz of these)")
    return files


def _suffix(file: Path) -> str:
    """Find the file's suffix, without that of compression."""
    name = file.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _read_file(file: Path, what: str, *, in_parts: bool = False) -> Iterator[tuple[str, Any]]:
    has_records = False
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            for record in _records(stream, file, in_parts):
                has_records = True
                yield record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file} is not a sound gzip file: {error}") from error
    except OSError as error:
        raise CorpusError(f"cannot read {file}: {error.strerror}") from error
    if not has_records:
        raise CorpusError(f"{file} has no {what}")


def _records(stream: BufferedIOBase, file: Path, in_parts: bool) -> Iterator[tuple[str, Any]]:
    """Read the records of a file, each with its place. JSON lines and parts are read only as far as they are asked for."""
    suffix = _suffix(file)
    if suffix in JSON_LINES_SUFFIXES:
        for number in count(start=1):
            where = f"{file}, line {number}"
            if not (line := _read(stream.readline, where)):
                break
            if line.strip():
                yield where, _parse(line, where)
    elif suffix in JSON_SUFFIXES:
        records = _parse(_read(stream.read, str(file)), str(file))
        if not isinstance(records, list):
            raise CorpusError(f"{file} is {json_kind(records)}, not a list of documents")
        for number, record in enumerate(records, start=1):
            yield f"{file}, item {number}", record
    else:
        read = (lambda limit: stream.read(PART_BYTES) + stream.readline(limit - PART_BYTES)) if in_parts else stream.read
        for number in count(start=1):
            where = f"{file}, part {number}" if in_parts else str(file)
            if not (content := _read(read, where)):
                break
            text = _decode(content, where).replace("\r\n", "\n")
            if text.strip():
                yield where, text


def _read(read: Callable[[int], bytes], where: str) -> bytes:
    """Read a file, or a line of one. It is held in memory as a whole, even if few tokens are asked for."""
    content = read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"{where} has more than {MAX_DOCUMENT_BYTES:,} bytes, and is held in memory as a whole: cut it into several "
            "documents, such as lines of a .jsonl file, or files (split --line-bytes=100M)"
        )
    return content


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where} is not UTF-8 text (byte {error.start} is not valid)") from error


def _parse(content: bytes, where: str) -> Any:
    try:
        value = json.loads(_decode(content, where))
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where} has half of a character: \\ud800 to \\udfff come in pairs") from error
    except json.JSONDecodeError as error:
        hint = "; if it has one document per line, name it .jsonl" if error.msg == "Extra data" else ""
        raise CorpusError(f"{where} is not JSON: {error}{hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise CorpusError(f"{where} is not JSON that can be read: {error}") from error


def _document(record: Any, where: str, field: str | None, chat: bool) -> Document:
    """Take the document in a record: the record itself, or its field; a conversation with the images of its record."""
    field = field or ("messages" if chat else "text")
    document, images = record, record.get("images") if isinstance(record, dict) else None
    if isinstance(record, dict):
        if field not in record:
            raise CorpusError(f"{where} has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
        document, where = record[field], f"{where}, field {field!r}"
    if chat:
        if not (isinstance(document, list) and document and all(isinstance(m, dict) and "role" in m for m in document)):
            raise CorpusError(f"{where} is not a list of messages with 'role' and 'content'")
        message_texts(without_images(document), where)
        return place_images(document, images, where) if isinstance(images, list) else document
    if document is None:
        raise CorpusError(f"{where} is null, not a string: leave records without text out")
    if not isinstance(document, str):
        raise CorpusError(f"{where} is {json_kind(document)}, not a string")
    return document
