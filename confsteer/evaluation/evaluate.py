"""Run a model over texts and compare steerings with each other and with temperatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer import defaults
from confsteer.bars import progress_bar
from confsteer.errors import CorpusError, SteeringError
from confsteer.evaluation.choices import ChoiceComparison
from confsteer.evaluation.comparison import Candidate, Sample, TextComparison, compare
from confsteer.evaluation.fit import fit_null_write, fit_temperature, match_entropy
from confsteer.evaluation.reader import Reader, interventions_of
from confsteer.evaluation.written import WrittenComparison
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.text_states import OnTokens, unnoticed
from confsteer.last_layer.unigram import Unigram
from confsteer.profile.profile import Profile
from confsteer.profile.schema import library_versions
from confsteer.results.result import ModelResult
from confsteer.steering import Steering
from confsteer.studies.induction import InductionStudy
from confsteer.text.several import Texts, named_windows
from confsteer.text.windows import Windows

FIT_TOKENS = 10_000
"""Most tokens to fit a baseline on. It is one number, and these are enough."""
MAX_SWEPT = 100


class Evaluation(ModelResult):
    """Steerings compared on texts."""

    profile: str
    """Checksum of the profile."""
    versions: dict[str, str]
    """Versions of the libraries that made it."""
    texts: tuple[TextComparison, ...]
    choices: tuple[ChoiceComparison, ...] = ()
    written: tuple[WrittenComparison, ...] = ()
    induction: InductionStudy | None = None

    @classmethod
    def begin(cls, profile: Profile, given: str = "", texts: tuple[TextComparison, ...] = ()) -> Evaluation:
        """Make one with a profile and the libraries that are installed.

        Args:
            profile: profile of the model.
            given: see `ModelResult`.
            texts: comparisons that there are already.
        """
        model, versions = profile.model.id, library_versions()
        return cls(model=model, given=given, profile=profile.checksum, versions=versions, texts=texts)


class EvaluationSettings(TypedDict, total=False):
    """Keywords of `evaluate`. Their defaults are in `confsteer.defaults.EVALUATION`."""

    unigram_counts: torch.Tensor | None
    """Token counts, ``[tokenizer_size]``; counted in each text if None."""
    tokens: int | None
    """Most tokens to read of each text; all if None."""
    window: int
    """Tokens per window."""
    smooth_ece: bool
    """Whether to compute smooth ECE too."""
    source: str
    """Name for the report of a text without one."""
    progress: bool
    """Whether to show progress bars."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    profile: Profile,
    steerings: Sequence[Steering],
    **settings: Unpack[EvaluationSettings],
) -> Evaluation:
    """Compare loss, entropy and calibration: unsteered, with each of `steerings`, and with the baselines of each.

    The baselines on each text are:

    - the temperature, fitted to one half of it and used on the other, and the other way round;
    - a constant written along the unembedding's null direction, fitted in the same way;
    - beside each steering, the temperature at which the unsteered model has the same mean entropy.

    A difference to the last one is what neurons know beyond a temperature. Temperatures and constants are fitted on a sample of
    the vocabulary (see `confsteer.last_layer.sample`). All reported numbers, their effects included, are of the whole
    vocabulary.

    The model runs once over each text (see `confsteer.last_layer.text_states`), on the same positions as calibration uses.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        texts: one string per document, or conversations (see `confsteer.text.windows.make_windows`), or ready-made windows; or
            several of these by name. For windows `tokens`, `window` and `source` are not used.
        profile: see `confsteer.steer`.
        steerings: steerings to compare with the unsteered model. All must be for every position.
        **settings: see `EvaluationSettings`:
        unigram_counts: token counts, ``[tokenizer_size]``; counted in each text if None.
        tokens: most tokens to read of each text; all if None.
        window: tokens per window.
        smooth_ece: whether to compute smooth ECE too. It takes a second per ten thousand tokens and row, and the package
            relplot.
        source: name for the report of a text without one.
        progress: whether to show progress bars.

    Raises:
        CorpusError: a text is too short.
        SettingError: the window is too short or longer than the model's context.
        SteeringError: see `confsteer.steer`, or a steering is not for all positions.
        ProfileMismatchError, NoNeuronsError: see `confsteer.steer`.
        TypeError: a keyword is not in `EvaluationSettings`.
    """
    # Validate before the model is used.
    defaults.with_defaults("evaluate", settings, defaults.EVALUATION)
    interventions_of(steerings, profile)
    compared = tuple(compare_texts(Reader(model, profile), tokenizer, texts, steerings, **settings))
    return Evaluation.begin(profile, texts=compared)


def compare_texts(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    steerings: Sequence[Steering],
    **settings: Unpack[EvaluationSettings],
) -> Iterator[TextComparison]:
    """Compare on one text after the other. The arguments are those of `evaluate`; the reader has its model and profile."""
    given = defaults.with_defaults("evaluate", settings, defaults.EVALUATION)
    unigram_counts, size = given["unigram_counts"], reader.profile.model.tokenizer_size
    names = [str(steering) for steering in steerings]
    steerings, interventions = interventions_of(steerings, reader.profile)
    every_text = named_windows(texts, tokenizer, tokens=given["tokens"], window=given["window"], source=given["source"])
    for name, windows in every_text:
        # Read the text once: every candidate follows in closed form.
        sample = read_sample(reader, windows, progress=given["progress"])
        if len(sample.block.unique()) < 2:
            raise CorpusError(f"{name}: a single window; baselines are fitted on one part of a text and judged on another")
        unigram = Unigram.from_counts(windows.counts(size) if unigram_counts is None else unigram_counts)
        yield _compare(sample, steerings, interventions, names, unigram, given)


def _compare(
    sample: Sample,
    steerings: Sequence[Steering],
    interventions: Sequence[Intervention],
    names: Sequence[str],
    unigram: Unigram,
    given: Mapping[str, Any],
) -> TextComparison:
    """Compare steerings with their baselines on one text, in two passes over the vocabulary: before and after the fits."""
    label = f"compare on {sample.source}"
    with progress_bar(label, 2 * sample.reading.tokens, show=given["progress"]) as bar:
        steered = with_matched_temperatures(sample, steerings, interventions, names, unigram, on_tokens=bar.update)
        candidates = [
            unsteered(sample),
            Candidate("fitted temperature", "temperature", sample.cross_fitted(fit_temperature, FIT_TOKENS)),
            Candidate("constant in the null space", "null write", sample.cross_fitted(fit_null_write, FIT_TOKENS)),
            *steered,
        ]
        return compare(sample, candidates, unigram, smooth_ece=given["smooth_ece"], on_tokens=bar.update)


def read_sample(reader: Reader, windows: Windows, *, progress: bool = False) -> Sample:
    """Run the model over a text; see `Reader.read`.

    Raises:
        CorpusError: no token of it counts.
        SettingError: its windows are longer than the model's context.
    """
    layer = reader.read(windows, progress=progress)
    block, unit = windows.blocks
    return Sample(windows.source, layer, torch.from_numpy(block)[layer.states.window.cpu()], unit)


def unsteered(sample: Sample) -> Candidate:
    """Make the candidate that all others are compared with: the unsteered model."""
    neutral = Intervention.neutral(sample.reading.readout.n_neurons)
    return Candidate("neutral", "neutral", sample.everywhere(neutral), Steering())


def with_matched_temperatures(
    sample: Sample,
    steerings: Sequence[Steering],
    interventions: Sequence[Intervention],
    names: Sequence[str],
    unigram: Unigram,
    *,
    on_tokens: OnTokens = unnoticed,
) -> list[Candidate]:
    """Pair each steering with the temperature that gives the unsteered model the same mean entropy on this text.

    This also computes the steerings' predictions, and samples the vocabulary for all fits.

    Args:
        sample: the text.
        steerings: the steerings that were asked for.
        interventions: the intervention of each steering, with anything that is done beside it.
        names: name of each, for the report.
        unigram: the distribution that divergences are measured from.
        on_tokens: called with the number of tokens after each block of the pass over the vocabulary.

    Returns:
        Each steering, followed by its temperature.
    """
    steered = [
        Candidate(name, "steering", sample.everywhere(intervention), steering)
        for steering, intervention, name in zip(steerings, interventions, names, strict=True)
    ]
    steered = sample.predict(steered, unigram, sample=True, on_tokens=on_tokens)
    entropies = [float(one.scored.scores.entropy.double().mean()) for one in steered if one.scored is not None]
    candidates = []
    for one, temperature in zip(steered, match_entropy(sample.reading, entropies), strict=True):
        like = f"temperature, entropy as {one.name}"
        matched = Candidate(like, "matched temperature", sample.everywhere(temperature), one.steering)
        candidates += [one, matched]
    return candidates


def sweep(text: str) -> list[Steering]:
    """Read a sweep: ``entropy=-0.4:1.2:9`` is nine values from −0.4 to 1.2, and ``scale.entropy=0:2:5`` five factors.

    Raises:
        SteeringError: it is not ``KEY=FIRST:LAST:NUMBER``.
    """
    key, _, span = text.partition("=")
    try:
        first, last, number = (kind(part) for kind, part in zip((float, float, int), span.split(":"), strict=True))
    except ValueError as error:
        raise SteeringError(f"{text!r} is not a sweep such as entropy=-0.4:1.2:9: KEY=FIRST:LAST:NUMBER") from error
    if not 2 <= number <= MAX_SWEPT:
        raise SteeringError(f"{text!r} is a sweep of {number} values: use 2 to {MAX_SWEPT}")
    return [Steering.parse(f"{key}={value:.12g}") for value in torch.linspace(first, last, number, dtype=torch.float64).tolist()]
