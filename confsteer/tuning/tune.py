"""Tuning on text: the gains and shifts of a profile's neurons that make held-out text likeliest, or best calibrated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer import defaults
from confsteer.bars import progress_bar
from confsteer.evaluation.comparison import Candidate, Sample, TextComparison, compare
from confsteer.evaluation.evaluate import read_sample, unsteered, with_matched_temperatures
from confsteer.evaluation.fit import (
    MAX_STEPS,
    Objective,
    fit,
    fit_null_write,
    fit_temperature,
    objective_estimate,
    temperature,
)
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.text_states import OnTokens
from confsteer.profile.profile import Profile
from confsteer.profile.schema import library_versions
from confsteer.results.bootstrap import Blocks, Interval, mean
from confsteer.results.result import ModelResult
from confsteer.steering import Steering
from confsteer.text.several import Texts, named_windows
from confsteer.tuning.parameters import parameters_of
from confsteer.tuning.splits import Split, split

Parameters = Literal["neurons", "dials"]


class Tuning(ModelResult):
    """Result of a tuning, and its effect on unseen text."""

    profile: str
    """Checksum of the profile that tuning started from."""
    versions: dict[str, str]
    parameters: Parameters
    objective: Objective
    steering: Steering
    temperature: float | None
    """Temperature that was tuned with the steering, to use with it. None if only the steering was tuned."""
    tokens: dict[str, int]
    """Number of tokens in each split, over all texts."""
    validation: Interval
    """Paired difference of the objective to neutral on the validation split, the mean over texts.

    It is for the steering alone, without the temperature, because only the steering is stored."""
    texts: tuple[TextComparison, ...]
    """Comparison on each text's test split."""
    left_out: tuple[TextComparison, ...]
    """Comparison on each text's test split, with everything fitted only on the other texts. Empty for a single text."""
    steps: int
    seconds: float

    @property
    def gained(self) -> bool:
        """Whether it beats neutral on the validation split by more than the interval."""
        return self.validation.high < 0


class Tuned(NamedTuple):
    """A steering that was found, with its temperature."""

    steering: Steering
    temperature: float | None
    intervention: Intervention
    """Steering and temperature together, as the last layer sees them."""
    steps: int


class TuningSettings(TypedDict, total=False):
    """Keywords of `tune`. Their defaults are in `confsteer.defaults.TUNING`."""

    parameters: Parameters
    """Numbers to tune: ``neurons`` or ``dials``."""
    with_temperature: bool
    """Whether to fit a temperature beside them."""
    objective: Objective
    """Quantity to minimise."""
    ridge: float
    """Pull towards neutral, as a share of the unsteered objective."""
    leave_one_out: bool
    """Whether to tune also on all texts but one, if there are several."""
    tokens: int | None
    """Most tokens to read of each text; all if None."""
    window: int
    """Tokens per window."""
    seed: int
    """Seed of the order in which documents are assigned."""
    source: str
    """Name for the report of a text without one."""
    progress: bool
    """Whether to show progress bars."""


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    profile: Profile,
    **settings: Unpack[TuningSettings],
) -> Tuning:
    """Find the best steering for text like `texts`, and measure its effect on parts that it was not tuned on.

    The model runs once over each text. The search is gradient descent on the closed form of the last layer. It uses a sample of
    the vocabulary (see `confsteer.last_layer.sample`), but all reported numbers are of the whole. Each text is cut into four
    parts by whole documents, and texts count equally:

    - the first part is for the fit, which is pulled towards neutral;
    - the second decides when to stop;
    - the third decides whether anything was gained;
    - the fourth is for the report.

    The result is compared with a temperature and a constant in the null space. Both are fitted to the loss on the same first
    parts, whatever the objective.

    Store the steering with ``profile.with_preset("calibrated", tuning.steering)``, if it `Tuning.gained` anything.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        texts: texts as for `confsteer.evaluation.evaluate.evaluate`. Several by name count equally. A steering tuned on one kind
            of text can do harm on another, so give all kinds that the model will see.
        profile: profile with the neurons to tune.
        **settings: see `TuningSettings`:
        parameters: ``neurons`` for a gain and a shift of each of the profile's neurons, or ``dials`` for the positions of its
            dials.
        with_temperature: whether to fit a temperature with them, to use in sampling.
        objective: quantity to minimise: ``nll``, ``brier`` (of the top prediction) or ``ece``.
        ridge: pull towards neutral. It is a share of the unsteered objective: the penalty for a gain off by one, or a shift
            by half of its dial's reach.
        leave_one_out: whether to estimate the effect on another kind of text, by tuning on all of several texts but one.
        tokens: most tokens to read of each text; all if None.
        window: tokens per window.
        seed: seed of the order in which documents are assigned.
        source: name for the report of a text without one.
        progress: whether to show progress bars.

    Raises:
        CorpusError: a text is too short to be cut in four.
        SettingError: the window is too short or longer than the model's context; or see
            `confsteer.tuning.parameters.parameters_of`.
        NoNeuronsError, ProfileMismatchError: see `confsteer.steer`.
        TypeError: a keyword is not in `TuningSettings`.
    """
    began = time.monotonic()
    given = defaults.with_defaults("tune", settings, defaults.TUNING)
    progress = given["progress"]
    # Refuse what cannot be tuned before any text is read.
    parameters_of(profile, given["parameters"])

    # Read each text once and cut it in four.
    reader, splits = Reader(model, profile), []
    for _, windows in named_windows(texts, tokenizer, tokens=given["tokens"], window=given["window"], source=given["source"]):
        splits.append(split(read_sample(reader, windows, progress=progress), windows, profile, given["seed"]))

    # Search on all texts, then on all but each, on a sample of the vocabulary.
    _sample_vocabulary(splits, progress)
    tuner = _Tuner(profile, given["parameters"], given["with_temperature"], given["objective"], given["ridge"], progress)
    best = tuner.find(splits, "tune")
    fits = [_Fitted(best, *_fit_baselines(splits))]
    left_out = tuner.leave_one_out(splits) if given["leave_one_out"] and len(splits) > 1 else []

    # Judge on parts that took no part in the search.
    steered = profile.intervention(best.steering)
    total = sum(one.validation.reading.tokens + 2 * one.test.reading.tokens for one in splits)
    with progress_bar("judge", total, show=progress) as bar:
        validation = _gain(given["objective"], steered, [one.validation for one in splits], bar.update)
        reports = [_report(one, fits + left_out[i : i + 1], bar.update) for i, one in enumerate(splits)]
    return Tuning(
        model=profile.model.id,
        profile=profile.checksum,
        versions=library_versions(),
        parameters=given["parameters"],
        objective=given["objective"],
        steering=best.steering,
        temperature=best.temperature,
        tokens={
            part: sum(getattr(one, part).reading.tokens for one in splits) for part in ("train", "stop", "validation", "test")
        },
        validation=validation,
        texts=tuple(text for text, *_ in reports),
        left_out=tuple(text for _, *others in reports for text in others),
        steps=best.steps,
        seconds=time.monotonic() - began,
    )


class _Tuner(NamedTuple):
    """The search as it was asked for: the same on all texts as on all texts but one."""

    profile: Profile
    parameters: Parameters
    with_temperature: bool
    objective: Objective
    ridge: float
    progress: bool

    def find(self, splits: Sequence[Split], label: str) -> Tuned:
        """Search with a progress bar called `label`."""
        with progress_bar(label, MAX_STEPS, "step", show=self.progress) as bar:

            def on_step(step: int, score: float) -> None:
                bar.set_postfix(validation=f"{score:.4f}", refresh=False)
                bar.update()

            return search(
                self.profile,
                splits,
                self.parameters,
                self.with_temperature,
                objective=self.objective,
                ridge=self.ridge,
                on_step=on_step,
            )

    def leave_one_out(self, splits: Sequence[Split]) -> list[_Fitted]:
        """Fit everything on all texts but each."""
        fits = []
        for one in splits:
            others = [other for other in splits if other is not one]
            fits.append(_Fitted(self.find(others, f"tune without {one.test.source}"), *_fit_baselines(others)))
        return fits


class _Fitted(NamedTuple):
    """Everything that is fitted on some texts."""

    tuned: Tuned
    temperature: Intervention
    null_write: Intervention


def _sample_vocabulary(splits: Sequence[Split], progress: bool) -> None:
    """Make ready to search: draw the sample of the vocabulary for the parts that searches look at."""
    parts = [part.reading for one in splits for part in (one.train, one.stop)]
    total = sum(part.tokens for part in parts)
    with progress_bar("sample the vocabulary", total, show=progress) as bar:
        for part in parts:
            part.draw_sample(bar.update)


def search(
    profile: Profile,
    splits: Sequence[Split],
    parameters: Parameters = defaults.PARAMETERS,
    with_temperature: bool = False,
    *,
    objective: Objective = defaults.OBJECTIVE,
    ridge: float = defaults.RIDGE,
    on_step: Callable[[int, float], object] = lambda step, score: None,
) -> Tuned:
    """Find the best steering for texts that are read already.

    Args:
        profile: see `tune`.
        splits: the texts, cut in four.
        parameters: see `tune`.
        with_temperature: see `tune`.
        objective: see `tune`.
        ridge: see `tune`.
        on_step: function called after each step with its number and the best score so far.
    """
    ways = parameters_of(profile, parameters)

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
    # Report the stored steering, as rounded.
    intervention = profile.intervention(steering)._replace(temperature=found.intervention.temperature)
    return Tuned(steering, float(intervention.temperature) if with_temperature else None, intervention, found.steps)


def _gain(objective: Objective, intervention: Intervention, samples: Sequence[Sample], on_tokens: OnTokens) -> Interval:
    """Estimate the difference of the objective to neutral, the mean over texts, whose blocks are resampled text by text."""
    differences = []
    for number, sample in enumerate(samples):
        blocks, reading = Blocks(sample.block, seed=number), sample.reading
        neutral = Intervention.neutral(reading.readout.n_neurons)
        pair = reading.predict([reading.coordinates(one) for one in (intervention, neutral)], on_tokens=on_tokens)
        with_it, without = (objective_estimate(objective, one.scores, blocks) for one in pair)
        differences.append(with_it - without)
    return mean(differences).interval


def _fit_baselines(splits: Sequence[Split]) -> tuple[Intervention, Intervention]:
    """Fit the baselines of a steering tuned on these texts: a temperature, and a constant in the null space."""
    train = [one.train.reading for one in splits]
    return fit_temperature(train), fit_null_write(train)


def _report(on: Split, fits: Sequence[_Fitted], on_tokens: OnTokens) -> list[TextComparison]:
    """Compare steerings with their baselines on a text's test split, in two passes over the vocabulary for all of them."""
    sample = on.test
    tuned = [one.tuned for one in fits]
    steered = with_matched_temperatures(
        sample,
        [one.steering for one in tuned],
        [one.intervention for one in tuned],
        ["tuned"] * len(tuned),
        on.unigram,
        on_tokens=on_tokens,
    )
    others = [unsteered(sample)]
    for one in fits:
        others.append(Candidate("fitted temperature", "temperature", sample.everywhere(one.temperature)))
        others.append(Candidate("constant in the null space", "null write", sample.everywhere(one.null_write)))
    neutral, *rest = sample.predict([*others, *steered], on.unigram, on_tokens=on_tokens)
    # List two baselines for each fit, then each steering with its temperature.
    pairs = [rest[i : i + 2] for i in range(0, len(rest), 2)]
    return [compare(sample, [neutral, *pairs[i], *pairs[i + len(fits)]], on.unigram) for i in range(len(fits))]
