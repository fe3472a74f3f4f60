"""What entropy neurons do when a text repeats itself (Stolfo et al. 2024, arXiv 2406.16254, section 5).

A stretch of tokens is read twice. At the second reading a model with induction heads knows what comes next: its loss and its
entropy fall. Each entropy neuron is then clipped at its mean activation of the first reading, from above if its mean rises
at the second reading and from below if it falls, so that it cannot take part in the change: what the entropy does then,
against what it did before, is the neuron's share in it. As in the paper the clip holds at every position.

Clipping is an edit of the last layer, so one forward pass and the closed form of the readout give every clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.errors import CorpusError, SettingError
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.states import TokenStates
from confsteer.model.anatomy import Anatomy
from confsteer.model.dissect import dissect
from confsteer.model.states import Recording
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import Change, Interval, ratio_interval
from confsteer.results.result import Result
from confsteer.text.windows import (
    FIRST_POSITIONS,
    MIN_WINDOW,
    Document,
    Windows,
    context_length,
    control_ids,
    leading_ids,
    make_windows,
)

SequenceKind = Literal["random", "natural"]


class PositionCurve(Result):
    """A mean over sequences at each position, with its standard error over sequences."""

    mean: tuple[float, ...]
    standard_error: tuple[float, ...]


class PassMeans(Result):
    """Means over the positions of one reading of the stretch, in nats."""

    entropy: Interval
    loss: Interval


class ClippedNeuron(Result):
    """A neuron's activation, and the clip that follows from it."""

    index: int
    activation: PositionCurve
    """By position."""
    first_mean: float
    """Over the first reading: the bound of the clip."""
    second_mean: float
    """Over the second reading."""
    clipped_from: Literal["above", "below"]
    """Above if the mean rises from the first reading to the second."""


class ClipEffect(Result):
    """What clipping one or more neurons does."""

    neurons: tuple[int, ...]
    entropy: PositionCurve
    """By position, with the clip."""
    loss: PositionCurve
    first_entropy: Change
    """Of the mean entropy of the first reading, clipped less unsteered."""
    first_loss: Change
    second_entropy: Change
    """The same of the second reading."""
    second_loss: Change


class RepeatedSequences(Result):
    """What was measured on one kind of repeated sequences. Intervals and errors are over sequences, for the clips as they are."""

    kind: SequenceKind
    source: str
    sequences: int
    positions: tuple[int, ...]
    """Positions of the sequence that the curves are of: without the first three and the last."""
    repeats_from: int
    """Position at which the second reading starts."""
    entropy: PositionCurve
    """Of the unsteered model, by position."""
    loss: PositionCurve
    first: PassMeans
    """Unsteered, over the positions of the first reading that have a counterpart in the second: the same predictions."""
    second: PassMeans
    neurons: tuple[ClippedNeuron, ...]
    clips: tuple[ClipEffect, ...]
    """Each neuron alone, then, if there are several, all together."""


class InductionStudy(Result):
    """Repeated sequences, unsteered and with the entropy neurons clipped."""

    model: str
    half: int
    """Tokens of a stretch."""
    seed: int
    kinds: tuple[RepeatedSequences, ...]


def induction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    *,
    texts: Iterable[Document] | Windows | None = None,
    source: str = "texts",
    sequences: int = 100,
    half: int = 100,
    seed: int = 0,
    neurons: Sequence[int] | None = None,
    progress: bool = False,
) -> InductionStudy:
    """Entropy, loss and neuron activations by position on stretches that are read twice, with and without clipping.

    A sequence is a stretch of `half` tokens, twice, after a BOS if the tokenizer starts texts with it.

    Args:
        model: the profile's model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        profile: says which neurons are entropy neurons.
        texts: documents for natural stretches, cut one after the other from each, or windows that end in them; only random
            stretches if None.
        source: what `texts` are, for the report.
        sequences: of each kind; fewer natural ones if the text is short.
        half: tokens of a stretch.
        seed: of the random tokens, which are uniform over the vocabulary without special tokens.
        neurons: of the last layer, to clip instead of the profile's entropy neurons.
        progress: whether to show a progress bar.

    Raises:
        NoNeuronsError: the profile has no entropy neurons and `neurons` is None.
        SettingError: `sequences`, `half` or a neuron out of range.
        CorpusError: the text has fewer than two stretches.
        ProfileMismatchError, UnsupportedModelError: see `confsteer.steer`.
    """
    if neurons is None:
        profile.require_neurons("entropy")
        neurons = [neuron.index for neuron in profile.entropy_neurons]
    if not neurons or not all(0 <= index < profile.model.n_neurons for index in neurons):
        raise SettingError(f"neurons {list(neurons)}: give some from 0 to {profile.model.n_neurons - 1}")
    check_repetition(model, tokenizer, sequences, half)
    model.eval()
    anatomy = dissect(model)
    profile.check_model(anatomy)
    random = random_stretches(tokenizer, profile.model.tokenizer_size, sequences, half, seed=seed)
    repeated: dict[SequenceKind, Windows] = {"random": read_twice(tokenizer, random, "uniform tokens")}
    if texts is not None:
        length = len(leading_ids(tokenizer)) + half
        # Twice as many as wanted, since some have control tokens.
        windows = make_windows(texts, tokenizer, window=length, max_tokens=2 * sequences * length, source=source)
        repeated["natural"] = read_twice(tokenizer, natural_stretches(windows, sequences, half), windows.source)
    kinds = []
    with torch.no_grad():
        readout = anatomy.readout(profile.model.tokenizer_size)
        for kind, windows in repeated.items():
            kinds.append(_measure(model, anatomy, readout, windows, torch.tensor(neurons), half, kind, progress))
    return InductionStudy(model=profile.model.id, half=half, seed=seed, kinds=tuple(kinds))


def check_repetition(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: int, half: int) -> None:
    """
    Raises:
        SettingError: there are too few sequences for an interval, or the model cannot read stretches of `half` tokens twice.
    """
    if sequences < 2:
        raise SettingError(f"{sequences} sequences give no interval: use at least 2")
    context = context_length(model.config)
    longest = half if context is None else (context - len(leading_ids(tokenizer))) // 2
    if not MIN_WINDOW <= half <= longest:
        raise SettingError(f"stretches of {half} tokens read twice: use {MIN_WINDOW} to {longest} for this model")


def read_twice(tokenizer: PreTrainedTokenizerBase, stretches: np.ndarray, source: str) -> Windows:
    """A window for each of `stretches` ``[sequences, half]``: BOS if the tokenizer starts texts with it, the stretch, twice."""
    first_ids = np.tile(leading_ids(tokenizer), (len(stretches), 1))
    ids = np.concatenate([first_ids, stretches, stretches], axis=1).astype(np.int32)
    starts = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
    return Windows(ids.ravel(), starts, control_ids(tokenizer), ids.shape[1], source, np.arange(len(ids)))


def random_stretches(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, sequences: int, half: int, *, seed: int = 0
) -> np.ndarray:
    """Tokens drawn uniformly from the first `vocab_size` ids of the tokenizer without its special ones, ``[sequences, half]``."""
    special = set(tokenizer.all_special_ids)
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i < vocab_size and i not in special)
    return np.random.default_rng(seed).choice(ids, (sequences, half))


def natural_stretches(windows: Windows, sequences: int, half: int) -> np.ndarray:
    """The last `half` tokens of the first `sequences` full windows, ``[at most sequences, half]``.

    A stretch with a control token is left out: it would start a text anew.

    Raises:
        CorpusError: there are fewer than two.
    """
    ends = windows.starts[1:][np.diff(windows.starts) == windows.window]
    stretches = [windows.token_ids[end - half : end] for end in ends]
    found = [stretch for stretch in stretches if not np.isin(stretch, windows.special_ids).any()]
    if len(found) < 2:
        raise CorpusError(f"the text has {len(found)} stretches of {half} tokens, too few for an interval; give more text")
    return np.array(found[:sequences])


def _measure(
    model: PreTrainedModel,
    anatomy: Anatomy,
    readout: Readout,
    windows: Windows,
    neurons: Tensor,
    half: int,
    kind: SequenceKind,
    progress: bool,
) -> RepeatedSequences:
    device = readout.unembedding.device
    length = windows.n_tokens // len(windows)
    positions = range(FIRST_POSITIONS, length - 1)
    shape = (len(windows), len(positions))
    # A prediction of the second reading and the same one, `half` positions before, of the first.
    first, second = slice(0, len(positions) - half), slice(half, len(positions))

    recording = Recording(model, anatomy, windows, device)

    def states(stage: str) -> Iterator[TokenStates]:
        with tqdm(total=windows.n_tokens, desc=f"{kind} {stage}", unit="tok", unit_scale=True, disable=not progress) as bar:
            yield from recording.read(bar.update)

    activations = torch.cat([batch.activations[:, neurons].double().cpu() for batch in states("1/2 activations")])
    activations = activations.view(*shape, len(neurons))
    first_mean, second_mean = activations[:, first].mean(dim=(0, 1)), activations[:, second].mean(dim=(0, 1))
    rises = second_mean > first_mean
    low = torch.where(rises, -torch.inf, first_mean).float().to(device)
    high = torch.where(rises, first_mean, torch.inf).float().to(device)

    every = list(range(len(neurons)))
    clipped = [[row] for row in every] + ([every] if len(every) > 1 else [])
    entropy = torch.empty(1 + len(clipped), *shape, dtype=torch.float64)
    loss = torch.empty_like(entropy)
    few = readout.select(neurons.to(device))
    done = 0
    for batch in states("2/2 clips"):
        before = batch.activations[:, neurons].float()
        delta = before.clamp(low, high) - before
        rows = slice(done, done + len(before) // len(positions))
        done = rows.stop
        state = few.state(batch.residual, batch.mlp_output)
        for condition, chosen in enumerate([[], *clipped]):
            change_by = torch.zeros_like(delta)
            change_by[:, chosen] = delta[:, chosen]
            residual = few.residual_after(state, change_by)
            scores = TokenScores.of_residual(readout, residual, batch.targets)
            entropy[condition, rows] = scores.entropy.double().cpu().view(-1, len(positions))
            loss[condition, rows] = scores.nll.double().cpu().view(-1, len(positions))

    n = torch.full((len(windows),), float(len(positions) - half), dtype=torch.float64)

    def reading(where: slice) -> PassMeans:
        return PassMeans(
            entropy=ratio_interval(entropy[0, :, where].sum(dim=1), n), loss=ratio_interval(loss[0, :, where].sum(dim=1), n)
        )

    def change(values: Tensor, condition: int, where: slice) -> Change:
        before, after = values[0, :, where].sum(dim=1), values[condition, :, where].sum(dim=1)
        return Change.of(after - before, before, n)

    return RepeatedSequences(
        kind=kind,
        source=windows.source,
        sequences=len(windows),
        positions=tuple(positions),
        repeats_from=length - half,
        entropy=_curve(entropy[0]),
        loss=_curve(loss[0]),
        first=reading(first),
        second=reading(second),
        neurons=tuple(
            ClippedNeuron(
                index=int(index),
                activation=_curve(activations[:, :, row]),
                first_mean=float(first_mean[row]),
                second_mean=float(second_mean[row]),
                clipped_from="above" if rises[row] else "below",
            )
            for row, index in enumerate(neurons)
        ),
        clips=tuple(
            ClipEffect(
                neurons=tuple(int(neurons[row]) for row in chosen),
                entropy=_curve(entropy[condition]),
                loss=_curve(loss[condition]),
                first_entropy=change(entropy, condition, first),
                first_loss=change(loss, condition, first),
                second_entropy=change(entropy, condition, second),
                second_loss=change(loss, condition, second),
            )
            for condition, chosen in enumerate(clipped, start=1)
        ),
    )


def _curve(values: Tensor) -> PositionCurve:
    """Of ``[sequences, positions]``."""
    return PositionCurve(
        mean=tuple(values.mean(dim=0).tolist()),
        standard_error=tuple((values.std(dim=0) / len(values) ** 0.5).tolist()),
    )
