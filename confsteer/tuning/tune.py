"""Steering chosen by data: the gains and shifts of a profile's neurons that make held-out text likeliest, or best calibrated."""

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
    """Outcome of a tuning, and its effect on text that it has not seen."""

    profile: str
    """Checksum of the profile tuning started from."""
    versions: dict[str, str]
    parameters: Parameters
    objective: Objective
    steering: Steering
    temperature: float | None
    """Tuned together with the steering, to be used with it; None if only the steering was tuned."""
    tokens: dict[str, int]
    """Number of tokens in each split, over all texts."""
    validation: Interval
    """Paired difference of the objective to neutral on the validation split, the mean over texts.

    It is of the steering alone, without the temperature, since the steering is what is stored."""
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


class Tuned(NamedTuple):
    """A steering found, with its temperature."""

    steering: Steering
    temperature: float | None
    intervention: Intervention
    """Steering and temperature together, as the last layer sees them."""
    steps: int


class TuningSettings(TypedDict, total=False):
    """Keywords of `tune`; those left out are as in `confsteer.defaults.TUNING`."""

    parameters: Parameters
    """Numbers to tune: ``neurons`` or ``dials``."""
    with_temperature: bool
    """Whether to fit a temperature beside them."""
    objective: Objective
    """Quantity to minimise."""
    ridge: float
    """Pull towards neutral, as a part of the unsteered objective."""
    leave_one_out: bool
    """Whether to tune on all texts but one too, where there are several."""
    tokens: int | None
    """Tokens of each text to read at most; all if None."""
    window: int
    """Tokens per window."""
    seed: int
    """Seed of the order in which documents are shared out."""
    source: str
    """Name of a text that has none, for the report."""
    progress: bool
    """Whether to show progress bars."""


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    profile: Profile,
    **settings: Unpack[TuningSettings],
) -> Tuning:
    """Find the steering that does best on text like `texts`, and say what it does on parts of them that it was not tuned on.

    The model runs once over each text. The search is gradient descent on the closed form of the last layer, on a sample of the
    vocabulary (see `confsteer.last_layer.sample`); all that is reported is of the whole.
    Each text is cut in four, whole documents together, and texts count equally:

    - the parameters are fitted to the first part, pulled towards neutral;
    - the second part says when to stop;
    - the third says whether anything was gained;
    - the fourth is reported on.

    The result is held against a temperature and a constant in the null space. Both are fitted to the loss of the same first
    parts, whatever the objective.

    Store what was found with ``profile.with_preset("calibrated", tuning.steering)``, if it `Tuning.gained` anything.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        texts: as `confsteer.evaluation.evaluate.evaluate` takes them; several by name count equally. What is tuned on one kind
            of text can do harm on another, so give all kinds that the model will see.
        profile: whose neurons to tune.
        **settings: see `TuningSettings`:
        parameters: ``neurons``: a gain and a shift of each of the profile's neurons; ``dials``: the positions of its dials.
        with_temperature: whether to fit a temperature beside them, to sample with.
        objective: what to minimise: ``nll``, ``brier`` (of the top prediction) or ``ece``.
        ridge: pull towards neutral: part of the unsteered objective that is the penalty for a gain that is one off, or a shift by
            half of what its dial can do.
        leave_one_out: of several texts: whether to estimate what happens on a text of another kind, by tuning on all but one.
        tokens: read at most this many of each text; all if None.
        window: tokens per window.
        seed: of the order in which documents are shared out.
        source: what the text is, for the report, if it has no name.
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
    """Find the steering that does best on texts that are read already.

    Args:
        profile: see `tune`.
        splits: the texts, cut in four.
        parameters: see `tune`.
        with_temperature: see `tune`.
        objective: see `tune`.
        ridge: see `tune`.
        on_step: called after each step with its number and the best score so far.
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
    # Report what the stored steering does, digits and all.
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
    """Fit the temperature and the constant in the null space that a steering tuned on these texts is held against."""
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
    # Two baselines for each fit, then each steering with its temperature.
    pairs = [rest[i : i + 2] for i in range(0, len(rest), 2)]
    return [compare(sample, [neutral, *pairs[i], *pairs[i + len(fits)]], on.unigram) for i in range(len(fits))]
