"""Text to token windows, and which positions of a window count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confsteer.errors import CorpusError, SettingError

FIRST_POSITIONS = 3
"""Positions at the start of a window that are left out: with so little context they are unlike the rest."""
SHORTEST_WINDOW = 8
SHORT_PARAGRAPH = 60
"""Characters below which a repeated paragraph is a phrase such as "Example:"."""


@dataclass(frozen=True)
class Batch:
    """A few windows, padded on the right to the longest."""

    input_ids: Tensor
    """``[windows, length]``"""
    attention_mask: Tensor
    """``[windows, length]``, 0 on padding."""
    kept: Tensor
    """Positions that count, ``[windows, length]`` bool; the next token is inside the window at each."""

    @property
    def targets(self) -> Tensor:
        """The token that follows each kept position, ``[kept tokens]``."""
        return self.input_ids.roll(-1, dims=1)[self.kept]

    @property
    def window(self) -> Tensor:
        """Index within the batch of the window each kept position is in, ``[kept tokens]``."""
        return self.kept.nonzero()[:, 0]


@dataclass(frozen=True)
class Windows:
    """A corpus as token windows that never cross documents.

    The ids are held in memory, four bytes per token; everything computed from them is streamed.
    """

    token_ids: NDArray[np.int32]
    """All windows one after the other, ``[tokens]``."""
    starts: NDArray[np.int64]
    """Where each window starts in `token_ids`, and the end of the last, ``[windows + 1]``."""
    special_ids: tuple[int, ...]
    """Ids (BOS, EOS) that do not count, nor does the token after each."""
    source: str
    """What the text was, for the profile."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def sha256(self) -> str:
        """Hash of the token ids and of where the windows start."""
        digest = hashlib.sha256(self.token_ids.astype("<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs, BOS and EOS not counted, ``[vocab_size]`` int64."""
        counts = np.bincount(self.token_ids, minlength=vocab_size)
        counts[[i for i in self.special_ids if i < len(counts)]] = 0
        return torch.from_numpy(counts)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The windows in order, `batch_size` at a time."""
        for first in range(0, len(self), batch_size):
            last = min(first + batch_size, len(self))
            windows = [self.token_ids[self.starts[i] : self.starts[i + 1]] for i in range(first, last)]
            length = max(map(len, windows))
            input_ids = np.zeros((len(windows), length), dtype=np.int64)
            attention_mask = np.zeros_like(input_ids)
            for row, window in enumerate(windows):
                input_ids[row, : len(window)] = window
                attention_mask[row, : len(window)] = 1
            yield Batch(
                torch.from_numpy(input_ids),
                torch.from_numpy(attention_mask),
                torch.from_numpy(self._kept(input_ids, attention_mask)),
            )

    def _kept(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Without the first positions, the last of each window, BOS/EOS and the token after these."""
        kept = attention_mask.astype(bool)
        kept[:, :-1] &= attention_mask[:, 1:].astype(bool)
        kept[:, -1] = False
        kept[:, :FIRST_POSITIONS] = False
        special = np.isin(input_ids, self.special_ids)
        kept &= ~special
        kept[:, 1:] &= ~special[:, :-1]
        return kept


def make_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = 256,
    max_tokens: int | None = None,
    source: str = "texts",
) -> Windows:
    """Tokenize documents into windows.

    Every window starts with BOS if the tokenizer starts texts with it. A document's last, shorter window is kept if it has
    `SHORTEST_WINDOW` tokens.

    Args:
        texts: one string per document.
        tokenizer: the model's.
        window: tokens per window, BOS included.
        max_tokens: stop here; the whole text if None.
        source: a description of the text for the profile.

    Raises:
        SettingError: the window is too short.
        CorpusError: the text has not enough tokens for one window.
    """
    if window < SHORTEST_WINDOW:
        raise SettingError(f"a window of {window} tokens is too short; use at least {SHORTEST_WINDOW}")
    first_ids = leading_ids(tokenizer)
    body = window - len(first_ids)
    pieces: list[NDArray[np.int32]] = []
    total = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for first in range(0, len(ids), body):
            piece = [*first_ids, *ids[first : first + body]]
            if max_tokens is not None:
                piece = piece[: max_tokens - total]
            if len(piece) >= SHORTEST_WINDOW:
                pieces.append(np.asarray(piece, dtype=np.int32))
                total += len(piece)
            elif max_tokens is not None and total + SHORTEST_WINDOW > max_tokens:
                break
        if max_tokens is not None and total + SHORTEST_WINDOW > max_tokens:
            break
    if not pieces:
        raise CorpusError(f"the text is too short: it has no document of {SHORTEST_WINDOW} tokens")
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    return Windows(np.concatenate(pieces), starts, special_ids(tokenizer), source)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, if the tokenizer starts texts with it; otherwise nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """BOS and EOS, those that there are, ascending."""
    return tuple(sorted({i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None}))


def read_texts(paths: Iterable[Path]) -> list[str]:
    """One document per file, UTF-8.

    Raises:
        CorpusError: a file is missing, empty or not UTF-8 text.
    """
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path} is not UTF-8 text (byte {error.start} is not valid)") from error
        if not text.strip():
            raise CorpusError(f"{path} has no text")
        texts.append(text)
    return texts


def read_dataset(name: str, *, split: str = "train", field: str = "text") -> Iterator[str]:
    """Documents of a hub dataset, streamed.

    Raises:
        CorpusError: there is no such dataset, split or field.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds: not found, offline, no such split
        raise CorpusError(f"cannot load dataset {name!r}, split {split!r}: {error}") from error
    for record in dataset:
        if field not in record:
            raise CorpusError(f"dataset {name!r} has no field {field!r}; it has {', '.join(sorted(record))}")
        yield record[field]


def read_counts(path: Path) -> NDArray[np.integer]:
    """Token counts by id, from a ``.npy`` file.

    Raises:
        CorpusError: it is missing or no such file.
    """
    try:
        counts = np.load(path, allow_pickle=False)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CorpusError(f"{path} is not a .npy file of numbers") from error
    if not isinstance(counts, np.ndarray):
        raise CorpusError(f"{path} holds several arrays; give a .npy file of one")
    return counts


def python_docs(part: Literal["calibration", "held-out"]) -> list[str]:
    """Half of the language reference that ships with CPython (`pydoc_data.topics`), one document per topic.

    English prose that is on every machine: the text of the demonstration. Its topics go to the two parts in turn. Topics
    repeat each other, so a paragraph stays only where it comes first: the parts share no text beyond short phrases.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].split("\n\n") if len(p) < SHORT_PARAGRAPH or p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        documents.append("\n\n".join(paragraphs))
    return documents[0 if part == "calibration" else 1 :: 2]
