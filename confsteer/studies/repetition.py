"""Stretches of tokens that are read twice, random and natural ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.defaults import INDUCTION_HALF, INDUCTION_SEQUENCES, SEED
from confsteer.errors import CorpusError, SettingError
from confsteer.text.windows import MIN_WINDOW, Windows, context_length, control_ids, leading_ids


class Repetition(NamedTuple):
    """Number and length of the stretches that are read twice."""

    sequences: int = INDUCTION_SEQUENCES
    """Number of stretches of each kind. There are fewer natural ones if the text is short."""
    half: int = INDUCTION_HALF
    """Tokens of a stretch."""
    seed: int = SEED
    """Seed of the random tokens, which are uniform over the vocabulary without special tokens."""


DEFAULT_REPETITION = Repetition()


def random_repeats(tokenizer: PreTrainedTokenizerBase, vocab_size: int, repeat: Repetition) -> Windows:
    """Make windows of random stretches; see `random_stretches`."""
    stretches = random_stretches(tokenizer, vocab_size, repeat.sequences, repeat.half, seed=repeat.seed)
    return read_twice(tokenizer, stretches, "uniform tokens")


def natural_cut(tokenizer: PreTrainedTokenizerBase, repeat: Repetition) -> tuple[int, int]:
    """Choose how to cut a text for `natural_repeats`: tokens per window, and tokens to read.

    There are twice as many windows as stretches, because some have control tokens.
    """
    window = len(leading_ids(tokenizer)) + repeat.half
    return window, 2 * repeat.sequences * window


def natural_repeats(tokenizer: PreTrainedTokenizerBase, windows: Windows, repeat: Repetition) -> Windows:
    """Make windows of natural stretches; see `natural_stretches`."""
    return read_twice(tokenizer, natural_stretches(windows, repeat.sequences, repeat.half), windows.source)


def check_repetition(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, repeat: Repetition) -> None:
    """
    Raises:
        SettingError: there are too few sequences for an interval, or the model cannot read such stretches twice.
    """
    if repeat.sequences < 2:
        raise SettingError(f"{repeat.sequences} sequences give no interval: use at least 2")
    context = context_length(model.config)
    longest = repeat.half if context is None else (context - len(leading_ids(tokenizer))) // 2
    if not MIN_WINDOW <= repeat.half <= longest:
        raise SettingError(f"stretches of {repeat.half} tokens read twice: use {MIN_WINDOW} to {longest} for this model")


def read_twice(tokenizer: PreTrainedTokenizerBase, stretches: np.ndarray, source: str) -> Windows:
    """Make a window of each of `stretches` ``[sequences, half]``: BOS if the tokenizer uses it, then the stretch twice."""
    first_ids = np.tile(leading_ids(tokenizer), (len(stretches), 1))
    ids = np.concatenate([first_ids, stretches, stretches], axis=1).astype(np.int32)
    starts = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
    return Windows(ids.ravel(), starts, control_ids(tokenizer), ids.shape[1], source, np.arange(len(ids)))


def random_stretches(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, sequences: int, half: int, *, seed: int = 0
) -> np.ndarray:
    """Draw tokens uniformly from the first `vocab_size` ids of the tokenizer without its special ones, ``[sequences, half]``."""
    # Leave out all control tokens, whose positions do not count: some, such as chat markers, are not special tokens by name.
    special = {*tokenizer.all_special_ids, *control_ids(tokenizer)}
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i < vocab_size and i not in special)
    return np.random.default_rng(seed).choice(ids, (sequences, half))


def natural_stretches(windows: Windows, sequences: int, half: int) -> np.ndarray:
    """Take the last `half` tokens of the first `sequences` full windows, ``[at most sequences, half]``.

    A stretch with a control token is left out, because the token would start a new text. So is a stretch with an image, because
    the model would not see it.

    Raises:
        CorpusError: there are fewer than two.
    """
    ends = windows.starts[1:][np.diff(windows.starts) == windows.window]
    stretches = [windows.token_ids[end - half : end] for end in ends]
    found = [stretch for stretch in stretches if not np.isin(stretch, [*windows.special_ids, *windows.placeholder_ids]).any()]
    if len(found) < 2:
        raise CorpusError(f"the text has {len(found)} stretches of {half} tokens, too few for an interval; give more text")
    return np.array(found[:sequences])
