"""Token counts of a corpus, counted or from a file."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confsteer.bars import progress_bar
from confsteer.errors import CorpusError
from confsteer.files import MAX_COUNTS_BYTES, read_at_most
from confsteer.text.windows import Document, control_ids, token_ids_in_parts, vocabulary_size

MAX_COUNTED = 1e18
"""Largest sum of counts. A larger one does not fit an int64."""


def read_counts(path: str | os.PathLike[str]) -> NDArray[np.integer]:
    """Read token counts by id from a ``.npy`` file.

    Raises:
        CorpusError: it is missing, or not a ``.npy`` file.
    """
    try:
        counts = np.load(io.BytesIO(read_at_most(path, MAX_COUNTS_BYTES)), allow_pickle=False)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # numpy reads the header as Python, which can be wrong in many ways
        raise CorpusError(f"{path} is not a .npy file of numbers") from error
    if not isinstance(counts, np.ndarray):
        raise CorpusError(f"{path} holds several arrays; give a .npy file of one")
    return counts


def count_tokens(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, progress: bool = False
) -> NDArray[np.int64]:
    """Count how often each token occurs in a corpus of any size. The corpus is read once and not kept.

    Args:
        documents: strings or conversations. The chat template is applied to conversations.
        tokenizer: the model's tokenizer.
        progress: whether to show the number of tokens counted so far.

    Returns:
        Counts by id, ``[vocab]``. Those of control tokens are 0.

    Raises:
        CorpusError: no token was counted, or see `confsteer.text.windows.token_ids_in_parts`.
    """
    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    control = np.array(control_ids(tokenizer), dtype=np.int64)
    with progress_bar("counting", None, show=progress) as bar:
        for parts in token_ids_in_parts(documents, tokenizer):
            ids = np.fromiter(chain.from_iterable(parts), dtype=np.int64)
            counts += np.bincount(ids, minlength=len(counts))
            bar.update(len(ids))
    counts[control] = 0
    if not counts.any():
        raise CorpusError("the corpus has no tokens but control tokens: there is nothing to count")
    return counts


def checked_counts(counts: NDArray[np.integer], tokenizer_size: int) -> Tensor:
    """Check counts, and return them as ``[tokenizer_size]`` int64. The padding of longer arrays must be zero."""
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise CorpusError(f"unigram counts must be a row of integers from 0 up, not {counts.dtype} of shape {counts.shape}")
    if len(counts) < tokenizer_size or counts[tokenizer_size:].any():
        raise CorpusError(f"there are unigram counts for {len(counts)} tokens; the tokenizer has {tokenizer_size}")
    if counts.sum(dtype=np.float64) > MAX_COUNTED:
        raise CorpusError(f"the unigram counts add up to more than {MAX_COUNTED:.0e}: they are no counts of a text")
    return torch.from_numpy(counts[:tokenizer_size].astype(np.int64))


def counts_sha256(counts: Tensor) -> str:
    """SHA-256 of token counts ``[vocab]``, as little-endian int64."""
    return hashlib.sha256(counts.numpy().astype("<i8").tobytes()).hexdigest()
