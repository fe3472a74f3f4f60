"""Entropy neurons when a text repeats itself (Stolfo et al. 2024, arXiv 2406.16254, section 5).

A stretch of tokens is read twice. At the second reading a model with induction heads knows what comes next: its loss and its
entropy fall. Each entropy neuron is then clipped at its mean activation of the first reading. The clip is from above if the
mean rises at the second reading, and from below if it falls. So the neuron cannot take part in the change. The difference
that this makes to the entropy's change is the neuron's share in it. As in the paper the clip holds at every position.

Clipping is an edit of the last layer. So one forward pass and the closed form of the readout give the result of every clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.bars import progress_bar
from confsteer.errors import SettingError
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.states import TokenStates
from confsteer.model.dissect import dissect
from confsteer.model.states import Recording
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import Change, Interval, ratio_interval
from confsteer.results.result import Result
from confsteer.studies.repetition import DEFAULT_REPETITION, Repetition, check_repetition, natural_repeats, random_repeats
from confsteer.text.windows import FIRST_POSITIONS, Windows

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
    """Activation by position."""
    first_mean: float
    """Mean over the first reading, which is the bound of the clip."""
    second_mean: float
    """Mean over the second reading."""
    clipped_from: Literal["above", "below"]
    """Side of the clip: above if the mean rises from the first reading to the second."""


class ClipEffect(Result):
    """Effect of clipping one or more neurons."""

    neurons: tuple[int, ...]
    entropy: PositionCurve
    """Entropy by position, with the clip."""
    loss: PositionCurve
    first_entropy: Change
    """Change of the mean entropy of the first reading by the clip: clipped less unsteered."""
    first_loss: Change
    second_entropy: Change
    """The same for the second reading."""
    second_loss: Change


class RepeatedSequences(Result):
    """Measurements on one kind of repeated sequences. Intervals and errors are over sequences, with the clips fixed."""

    kind: SequenceKind
    source: str
    sequences: int
    positions: tuple[int, ...]
    """Positions of the sequence in the curves: all but the first three and the last."""
    repeats_from: int
    """Position at which the second reading starts."""
    entropy: PositionCurve
    """Entropy of the unsteered model, by position."""
    loss: PositionCurve
    first: PassMeans
    """Unsteered means over the positions of the first reading that predict the same tokens as positions of the second."""
    second: PassMeans
    neurons: tuple[ClippedNeuron, ...]
    clips: tuple[ClipEffect, ...]
    """Effects of each neuron alone, then, if there are several, of all together."""


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
    text: Windows | None = None,
    repeat: Repetition = DEFAULT_REPETITION,
    neurons: Sequence[int] | None = None,
    progress: bool = False,
) -> InductionStudy:
    """Measure entropy, loss and activations by position on stretches that are read twice, with and without clipping.

    A sequence is a stretch of tokens, twice. A BOS comes first if the tokenizer starts texts with it.

    Args:
        model: the profile's model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        profile: says which neurons are entropy neurons.
        text: windows that end in natural stretches. If None, only random stretches are used.
        repeat: number and length of the stretches, and the seed of the random ones.
        neurons: neurons of the last layer to clip, in place of the profile's entropy neurons.
        progress: whether to show a progress bar.

    Raises:
        NoNeuronsError: the profile has no entropy neurons and `neurons` is None.
        SettingError: `repeat` or a neuron is out of range.
        CorpusError: the text has fewer than two stretches.
        ProfileMismatchError, UnsupportedModelError: see `confsteer.steer`.
    """
    if neurons is None:
        neurons = profile.found("entropy")
    if not neurons or not all(0 <= index < profile.model.n_neurons for index in neurons):
        raise SettingError(f"neurons {list(neurons)}: give some from 0 to {profile.model.n_neurons - 1}")
    check_repetition(model, tokenizer, repeat)
    model.eval()
    anatomy = dissect(model)
    anatomy.require_dense("the study of induction")
    profile.check_model(anatomy)
    repeated: dict[SequenceKind, Windows] = {"random": random_repeats(tokenizer, profile.model.tokenizer_size, repeat)}
    if text is not None:
        repeated["natural"] = natural_repeats(tokenizer, text, repeat)

    kinds = []
    with torch.no_grad():
        readout = anatomy.readout(profile.model.tokenizer_size)
        for kind, windows in repeated.items():
            recording = Recording(model, anatomy, windows, readout.unembedding.device, readout=readout)
            sequences = _Sequences(recording, repeat.half, kind, show=progress)
            activations = _measure_activations(sequences, torch.tensor(neurons))
            clips = _clips_at_first_means(sequences, activations)
            outputs = _measure_clipped_outputs(sequences, readout, torch.tensor(neurons), clips)
            kinds.append(_describe(sequences, neurons, activations, clips, outputs))
    return InductionStudy(model=profile.model.id, half=repeat.half, seed=repeat.seed, kinds=tuple(kinds))


class _Sequences:
    """Stretches read twice, recorded, and which positions of them count."""

    def __init__(self, recording: Recording, half: int, kind: SequenceKind, *, show: bool) -> None:
        self.windows, self.kind, self.half = recording.windows, kind, half
        self._recording, self._show = recording, show
        self.length = self.windows.n_tokens // len(self.windows)
        self.positions = range(FIRST_POSITIONS, self.length - 1)
        # Pair a prediction of the second reading with the same one of the first, `half` positions before.
        self.first = slice(0, len(self.positions) - half)
        self.second = slice(half, len(self.positions))

    def read(self, stage: str) -> Iterator[TokenStates]:
        tokens = self.windows.n_tokens
        with progress_bar(f"{self.kind} {stage}", tokens, show=self._show) as bar:
            yield from self._recording.read(bar.update)


class _Clips(NamedTuple):
    """The range that each neuron is kept in, ``[neurons]`` each."""

    first_mean: Tensor
    second_mean: Tensor
    rises: Tensor
    """Whether the mean rises from the first reading to the second, bool."""

    @property
    def together(self) -> list[list[int]]:
        """Rows of the neurons that are clipped together: each alone, then, if there are several, all."""
        every = list(range(len(self.rises)))
        return [[row] for row in every] + ([every] if len(every) > 1 else [])

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lowest and highest activation of each neuron, float32."""
        low = torch.where(self.rises, -torch.inf, self.first_mean).float().to(device)
        return low, torch.where(self.rises, self.first_mean, torch.inf).float().to(device)


class _Outputs(NamedTuple):
    """Entropy and loss, unsteered and then under each clip, float64 ``[1 + clips, sequences, positions]``."""

    entropy: Tensor
    loss: Tensor


def _measure_activations(sequences: _Sequences, neurons: Tensor) -> Tensor:
    """Record the activations of `neurons`, float64 ``[sequences, positions, neurons]``."""
    batches = [batch.activations[:, neurons].double().cpu() for batch in sequences.read("1/2 activations")]
    return torch.cat(batches).view(len(sequences.windows), len(sequences.positions), len(neurons))


def _clips_at_first_means(sequences: _Sequences, activations: Tensor) -> _Clips:
    """Clip each neuron at its mean of the first reading, so that it cannot take part in the change to the second."""
    first, second = (activations[:, where].mean(dim=(0, 1)) for where in (sequences.first, sequences.second))
    return _Clips(first, second, second > first)


def _measure_clipped_outputs(sequences: _Sequences, readout: Readout, neurons: Tensor, clips: _Clips) -> _Outputs:
    """Measure entropy and loss of each token, unsteered and under each clip."""
    low, high = clips.bounds(readout.unembedding.device)
    few = readout.select(neurons.to(readout.unembedding.device))
    positions = len(sequences.positions)
    conditions = [[], *clips.together]
    entropy = torch.empty(len(conditions), len(sequences.windows), positions, dtype=torch.float64)
    loss = torch.empty_like(entropy)
    done = 0
    for batch in sequences.read("2/2 clips"):
        before = batch.activations[:, neurons].float()
        delta = before.clamp(low, high) - before
        rows = slice(done, done + len(before) // positions)
        done = rows.stop
        state = few.state(batch.residual, batch.mlp_output)
        for condition, chosen in enumerate(conditions):
            change = torch.zeros_like(delta)
            change[:, chosen] = delta[:, chosen]
            scores = TokenScores.of_residual(readout, few.residual_after(state, change), batch.targets)
            entropy[condition, rows] = scores.entropy.double().cpu().view(-1, positions)
            loss[condition, rows] = scores.nll.double().cpu().view(-1, positions)
    return _Outputs(entropy, loss)


def _describe(
    sequences: _Sequences, neurons: Sequence[int], activations: Tensor, clips: _Clips, outputs: _Outputs
) -> RepeatedSequences:
    """Report means over positions with intervals over sequences, and every curve by position."""
    windows, (entropy, loss) = sequences.windows, outputs
    n = torch.full((len(windows),), float(len(sequences.positions) - sequences.half), dtype=torch.float64)

    # Take sums per sequence: their ratios have intervals over sequences.
    def means(where: slice) -> PassMeans:
        return PassMeans(
            entropy=ratio_interval(entropy[0, :, where].sum(dim=1), n), loss=ratio_interval(loss[0, :, where].sum(dim=1), n)
        )

    def change(values: Tensor, condition: int, where: slice) -> Change:
        before, after = values[0, :, where].sum(dim=1), values[condition, :, where].sum(dim=1)
        return Change.of(after - before, before, n)

    return RepeatedSequences(
        kind=sequences.kind,
        source=windows.source,
        sequences=len(windows),
        positions=tuple(sequences.positions),
        repeats_from=sequences.length - sequences.half,
        entropy=_curve(entropy[0]),
        loss=_curve(loss[0]),
        first=means(sequences.first),
        second=means(sequences.second),
        neurons=tuple(
            ClippedNeuron(
                index=index,
                activation=_curve(activations[:, :, row]),
                first_mean=float(clips.first_mean[row]),
                second_mean=float(clips.second_mean[row]),
                clipped_from="above" if clips.rises[row] else "below",
            )
            for row, index in enumerate(neurons)
        ),
        clips=tuple(
            ClipEffect(
                neurons=tuple(neurons[row] for row in chosen),
                entropy=_curve(entropy[condition]),
                loss=_curve(loss[condition]),
                first_entropy=change(entropy, condition, sequences.first),
                first_loss=change(loss, condition, sequences.first),
                second_entropy=change(entropy, condition, sequences.second),
                second_loss=change(loss, condition, sequences.second),
            )
            for condition, chosen in enumerate(clips.together, start=1)
        ),
    )


def _curve(values: Tensor) -> PositionCurve:
    """Average ``[sequences, positions]`` over sequences."""
    return PositionCurve(
        mean=tuple(values.mean(dim=0).tolist()),
        standard_error=tuple((values.std(dim=0) / len(values) ** 0.5).tolist()),
    )
