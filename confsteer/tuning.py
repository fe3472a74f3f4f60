"""Steering chosen by data: the gains and shifts of a profile's neurons that make held-out text likeliest, or best calibrated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.errors import CorpusError
from confsteer.evaluation.comparison import Method, Sample, TextComparison, compare
from confsteer.evaluation.evaluate import Texts, named_texts, neutral_method, read_sample, with_matched_temperatures
from confsteer.evaluation.fit import (
    MOST_STEPS,
    Objective,
    fit,
    fit_null_write,
    fit_temperature,
    objective_estimate,
    temperature,
)
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.unigram import Unigram
from confsteer.profile.profile import Profile
from confsteer.profile.schema import library_versions
from confsteer.results.bootstrap import Blocks, Interval, mean
from confsteer.results.result import Result
from confsteer.steering import DIALS, Dial, Steering
from confsteer.text.windows import Windows, make_windows

DEFAULT_TOKENS = 40_000
RIDGE = 2e-5
"""Part of the unsteered objective that is the penalty for a gain that is one off, or a shift by half of what its dial can do."""
SPLITS = (0.5, 0.15, 0.15, 0.2)
"""Of a text: what is tuned on, what says when to stop, what says whether anything was gained, what is reported on.

What chose when to stop would find a gain where there is none."""
FEWEST_BLOCKS = 20
"""Documents or windows that can be shared out in this way."""

Parameters = Literal["neurons", "dials"]


class Tuning(Result):
    """What tuning found, and what it does to text it has not seen."""

    model: str
    profile: str
    """Checksum of the profile tuning started from."""
    versions: dict[str, str]
    parameters: Parameters
    objective: Objective
    steering: Steering
    temperature: float | None
    """Tuned together with the steering, to be used with it; None if only the steering was tuned."""
    tokens: dict[str, int]
    """Of the texts together: how many tokens are in each split."""
    validation: Interval
    """Paired difference of the objective to neutral on the validation split, the mean over texts: of the steering alone, without
    the temperature, since the steering is what is stored."""
    texts: tuple[TextComparison, ...]
    """Each text's test split."""
    left_out: tuple[TextComparison, ...]
    """Each text's test split with everything fitted on the other texts alone; empty for a single text."""
    steps: int
    seconds: float

    @property
    def gained(self) -> bool:
        """Whether it beats neutral on the validation split beyond the interval."""
        return self.validation.high < 0


class Split(NamedTuple):
    """A text in four parts."""

    train: Sample
    stop: Sample
    """What says when to stop."""
    validation: Sample
    """What says whether anything was gained."""
    test: Sample
    unigram: Unigram
    """Of the whole text."""


class Tuned(NamedTuple):
    """A steering found, with its temperature."""

    steering: Steering
    temperature: float | None
    intervention: Intervention
    """What the two do."""
    steps: int


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    profile: Profile,
    *,
    parameters: Parameters = "neurons",
    with_temperature: bool = False,
    objective: Objective = "nll",
    ridge: float = RIDGE,
    leave_one_out: bool = True,
    tokens: int | None = DEFAULT_TOKENS,
    window: int = 256,
    seed: int = 0,
    source: str = "texts",
    progress: bool = False,
) -> Tuning:
    """Find the steering that does best on text like `texts`, and say what it does on parts of them that it was not tuned on.

    The model runs once over each text; the rest is gradient descent on the closed form of the last layer, minutes on a CPU.
    Each text is cut in four, whole documents together: the parameters are fitted to the first part, pulled towards neutral;
    the second says when to stop; the third whether anything was gained; the fourth is reported on. Texts count equally. The
    temperature and the constant in the null space that the result is held against are fitted to the loss of the same first
    parts, whatever the objective.

    Store what was found with ``profile.with_preset("calibrated", tuning.steering)``, if it `Tuning.gained` anything.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        texts: as `confsteer.evaluation.evaluate.evaluate` takes them; several by name count equally. What is tuned on one kind
            of text can do harm on another, so give all kinds that the model will see.
        profile: whose neurons to tune.
        parameters: ``neurons``: a gain and a shift of each of the profile's neurons; ``dials``: the positions of both dials.
        with_temperature: whether to fit a temperature beside them, to sample with.
        objective: what to minimise: ``nll``, ``brier`` (of the top prediction) or ``ece``.
        ridge: pull towards neutral: part of the unsteered objective that is the penalty for a gain that is one off, or a shift by
            half of what its dial can do.
        leave_one_out: of several texts: whether to estimate what happens on a text of another kind, by tuning on all but one.
        tokens: read at most this many of each text.
        window: tokens per window.
        seed: of the order in which documents are shared out.
        source: what the text is, for the report, if it has no name.
        progress: whether to show progress bars.

    Raises:
        CorpusError: a text is too short to be cut in four.
        SettingError: the window is too short or longer than the model's context.
        NoNeuronsError, ProfileMismatchError: see `confsteer.steer`.
    """
    began = time.monotonic()
    reader = Reader(model, profile)
    splits = []
    for name, documents in named_texts(texts, source).items():
        windows = make_windows(documents, tokenizer, window=window, max_tokens=tokens, source=name)
        splits.append(split(read_sample(reader, windows, progress=progress), windows, profile, seed))

    def find(chosen: Sequence[Split], label: str) -> Tuned:
        with tqdm(total=MOST_STEPS, desc=label[:40], unit="step", disable=not progress) as bar:

            def on_step(step: int, score: float) -> None:
                bar.set_postfix(validation=f"{score:.4f}", refresh=False)
                bar.update()

            return search(profile, chosen, parameters, with_temperature, objective=objective, ridge=ridge, on_step=on_step)

    def report(fitted_on: Sequence[Split], tuned: Tuned, on: Split) -> TextComparison:
        train = [one.train.reading for one in fitted_on]
        return _report(on, tuned, fit_temperature(train), fit_null_write(train))

    best = find(splits, "tune")
    left_out = []
    if leave_one_out and len(splits) > 1:
        for one in splits:
            others = [other for other in splits if other is not one]
            left_out.append(report(others, find(others, f"tune without {one.test.source}"), one))
    train = [one.train.reading for one in splits]
    baselines = fit_temperature(train), fit_null_write(train)
    return Tuning(
        model=profile.model.id,
        profile=profile.checksum,
        versions=library_versions(),
        parameters=parameters,
        objective=objective,
        steering=best.steering,
        temperature=best.temperature,
        tokens={
            part: sum(getattr(one, part).reading.tokens for one in splits) for part in ("train", "stop", "validation", "test")
        },
        validation=_gain(objective, Intervention.of(profile.edit(best.steering)), [one.validation for one in splits]),
        texts=tuple(_report(one, best, *baselines) for one in splits),
        left_out=tuple(left_out),
        steps=best.steps,
        seconds=time.monotonic() - began,
    )


def split(sample: Sample, windows: Windows, profile: Profile, seed: int) -> Split:
    """A text in four parts that share no document; a text of few documents in four stretches.

    Raises:
        CorpusError: it is too short.
    """
    ids = sample.block.unique()
    if len(ids) < FEWEST_BLOCKS:
        raise CorpusError(
            f"{sample.source}: {len(ids)} {sample.unit} are too few to tune on, to stop by, to validate and "
            f"to report on; give text of at least {FEWEST_BLOCKS} windows of {windows.window} tokens"
        )
    if sample.unit == "documents":
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    numbers = torch.bincount(sample.block, minlength=int(ids.max()) + 1)[ids]
    # The part of the text that comes before the middle of each block says which part the block is in.
    middle = (numbers.cumsum(dim=0) - numbers / 2) / numbers.sum()
    part = torch.bucketize(middle, torch.tensor(SPLITS[:-1]).cumsum(dim=0))
    part[-1] = len(SPLITS) - 1  # however long the last document is
    of_block = torch.zeros(int(ids.max()) + 1, dtype=torch.long)
    of_block[ids] = part
    parts = []
    for which in range(len(SPLITS)):
        rows = (of_block[sample.block] == which).nonzero()[:, 0]
        if len(sample.block[rows].unique()) < 2:
            raise CorpusError(f"{sample.source}: its documents are too unequal to be shared out; give more of them")
        parts.append(sample._replace(reading=sample.reading.at(rows), block=sample.block[rows]))
    train, stop, validation, test = parts
    return Split(train, stop, validation, test, Unigram.from_counts(windows.counts(profile.model.tokenizer_size)))


def search(
    profile: Profile,
    splits: Sequence[Split],
    parameters: Parameters = "neurons",
    with_temperature: bool = False,
    *,
    objective: Objective = "nll",
    ridge: float = RIDGE,
    on_step: Callable[[int, float], object] = lambda step, score: None,
) -> Tuned:
    """The steering that does best on texts that are read already: see `tune`, whose arguments these are."""
    ways = NeuronParameters(profile) if parameters == "neurons" else DialParameters(profile)

    def build(at: Tensor) -> Intervention:
        intervention = ways.intervention(at)
        return intervention._replace(temperature=temperature(at[-1])) if with_temperature else intervention

    found = fit(
        build,
        torch.zeros(ways.number + with_temperature),
        [one.train.reading for one in splits],
        objective=objective,
        ridge=ridge,
        validation=[one.stop.reading for one in splits],
        on_step=on_step,
    )
    steering = ways.steering(found.parameters)
    # What is reported is what the stored steering does, digits and all.
    intervention = Intervention.of(profile.edit(steering))._replace(temperature=found.intervention.temperature)
    return Tuned(steering, float(intervention.temperature) if with_temperature else None, intervention, found.steps)


class NeuronParameters:
    """A gain about the mean and a shift, in units of half its dial's reach, of each neuron: ``2 · neurons`` parameters."""

    def __init__(self, profile: Profile) -> None:
        self.neurons = profile.steerable
        self.number = 2 * len(self.neurons)
        self._mean = torch.tensor([neuron.mean_activation for neuron in self.neurons])
        self._unit = torch.tensor(
            [neuron.std_activation * _half_reach(profile, dial) for dial in DIALS for neuron in profile.neurons(dial)]
        )

    def intervention(self, at: Tensor) -> Intervention:
        """What parameters ``[number, …]`` do; zero is neutral, what comes after them is not read."""
        gain, shift = self._gain_and_shift(at)
        return Intervention.neutral(len(self.neurons))._replace(gain=gain, bias=(1 - gain) * self._mean + shift)

    def steering(self, at: Tensor) -> Steering:
        """The same as a request."""
        gain, shift = self._gain_and_shift(at)
        return Steering(
            scale={neuron.index: _short(value) for neuron, value in zip(self.neurons, gain, strict=True)},
            shift={neuron.index: _short(value) for neuron, value in zip(self.neurons, shift, strict=True)},
        )

    def _gain_and_shift(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + at[: len(self.neurons)], at[len(self.neurons) : self.number] * self._unit


def _reach(profile: Profile, dial: Dial) -> tuple[float, float]:
    """Lowest and highest position."""
    low, high = (profile.dial_position(dial, change) for change in profile.reach(dial))
    return low, high


def _half_reach(profile: Profile, dial: Dial) -> float:
    low, high = _reach(profile, dial)
    return (high - low) / 2


class DialParameters:
    """The positions of the profile's dials, in units of half their reach and within it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.dials: list[Dial] = [dial for dial in DIALS if dial in profile.response]
        self.number = len(self.dials)
        neurons = profile.steerable
        # What position 1 of each dial adds to each activation, [dials, neurons].
        self._push = torch.tensor(
            [
                [neuron.sign * neuron.std_activation * (neuron in profile.neurons(dial)) for neuron in neurons]
                for dial in self.dials
            ]
        )
        self._low, self._high = torch.tensor([_reach(profile, dial) for dial in self.dials]).T

    def _positions(self, at: Tensor) -> Tensor:
        unit = (self._high - self._low) / 2
        positions: Tensor = (at[: self.number] * unit).maximum(self._low).minimum(self._high)
        return positions

    def intervention(self, at: Tensor) -> Intervention:
        """See `NeuronParameters`."""
        return Intervention.neutral(self._push.shape[1])._replace(bias=self._positions(at) @ self._push)

    def steering(self, at: Tensor) -> Steering:
        """See `NeuronParameters`."""
        changes: dict[str, Any] = {}
        for dial, position in zip(self.dials, self._positions(at).tolist(), strict=True):
            low, high = self.profile.reach(dial)
            curve = self.profile.response[dial]
            change = _short(float(np.interp(position, curve.position, curve.change(dial))))
            # After rounding, which may go beyond.
            changes[dial] = min(max(change, low), high)
        return Steering.parse(changes)


def _short(value: float | Tensor) -> float:
    """Six digits are more than the text can tell apart."""
    return float(f"{float(value):.6g}")


def _gain(objective: Objective, intervention: Intervention, samples: Sequence[Sample]) -> Interval:
    """Difference of the objective to neutral, the mean over texts; each text's blocks are resampled by themselves."""
    differences = []
    for number, sample in enumerate(samples):
        blocks = Blocks(sample.block, seed=number)
        neutral = Intervention.neutral(sample.reading.readout.n_neurons)
        with_it, without = (objective_estimate(objective, sample.reading.scores(i), blocks) for i in (intervention, neutral))
        differences.append(with_it - without)
    return mean(differences).interval


def _report(on: Split, tuned: Tuned, fitted: Intervention, constant: Intervention) -> TextComparison:
    sample = on.test
    methods = [
        neutral_method(sample),
        Method("fitted temperature", "temperature", sample.everywhere(fitted)),
        Method("constant in the null space", "null write", sample.everywhere(constant)),
        *with_matched_temperatures(sample, [tuned.steering], [tuned.intervention], ["tuned"]),
    ]
    return compare(sample, methods, on.unigram)
