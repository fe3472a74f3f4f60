"""Tuning on answers to multiple-choice questions, and its gain over a temperature on them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer import defaults
from confsteer.bars import progress_bar
from confsteer.errors import CorpusError
from confsteer.evaluation.answers import AnswerCandidate, answer_entropy, fit_answer_temperature, match_answer_entropy
from confsteer.evaluation.choice_sample import ChoiceSample, read_choices
from confsteer.evaluation.choices import ChoiceComparison, compare_answers
from confsteer.evaluation.fit import MAX_STEPS, minimise, sum_and_gradient, temperature
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.sample import SampledLogits
from confsteer.profile.profile import Profile
from confsteer.profile.schema import library_versions
from confsteer.results.bootstrap import Blocks, Interval, Resampled, mean
from confsteer.results.result import ModelResult
from confsteer.steering import Steering
from confsteer.text.prompts import AS_TEXT, Wording
from confsteer.text.questions import Question
from confsteer.tuning.parameters import DialParameters, NeuronParameters, parameters_of
from confsteer.tuning.splits import MIN_BLOCKS, SPLITS
from confsteer.tuning.tune import Parameters


class AnswerTuning(ModelResult):
    """Result of a tuning on answers, and its effect on unseen questions.

    In the rows of `choices` the tuned steering is judged together with its temperature on answers.
    """

    profile: str
    """Checksum of the profile that tuning started from."""
    versions: dict[str, str]
    parameters: Parameters
    steering: Steering
    temperature: float
    """Temperature on answers that was fitted with the steering."""
    alone: float
    """Temperature on answers that was fitted to the same questions without steering."""
    questions: dict[str, int]
    """Number of questions in each part, over all sets."""
    validation: Interval
    """Paired difference of the loss, the mean over sets: the steering with its temperature, less the temperature alone."""
    choices: tuple[ChoiceComparison, ...]
    """Comparison on each set's test part."""
    steps: int
    seconds: float

    @property
    def gained(self) -> bool:
        """Whether it beats the temperature on the validation part by more than the interval."""
        return self.validation.high < 0


class AnswerTuningSettings(TypedDict, total=False):
    """Keywords of `tune_answers`. Their defaults are in `confsteer.defaults.TUNING`."""

    parameters: Parameters
    """Numbers to tune: ``neurons`` or ``dials``."""
    ridge: float
    """Pull towards neutral, as a share of the unsteered loss."""
    seed: int
    """Seed of the order in which questions are assigned."""
    progress: bool
    """Whether to show progress bars."""


class AnswerSplit(NamedTuple):
    """Questions in four parts; see `confsteer.tuning.splits.SPLITS`."""

    train: ChoiceSample
    stop: ChoiceSample
    validation: ChoiceSample
    test: ChoiceSample
    wording: Wording


def tune_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence[Question]],
    profile: Profile,
    *,
    wordings: Sequence[Wording] = (AS_TEXT,),
    **settings: Unpack[AnswerTuningSettings],
) -> AnswerTuning:
    """Find the steering with which answers have the lowest loss, together with a temperature on whole choices.

    Every set of questions is cut into four parts by whole passages, as `confsteer.tuning.tune.tune` cuts texts. On the third
    part the steering has to beat a temperature alone, fitted to the first part. Both sides have a temperature, so a gain comes
    from the neurons.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        questions: questions by the name of their source. Sets count equally.
        profile: profile with the neurons to tune.
        wordings: their wordings. Each makes a set of its own.
        **settings: see `AnswerTuningSettings` and `confsteer.tuning.tune.tune`.

    Raises:
        CorpusError: there are too few questions, or see `confsteer.evaluation.choices.evaluate_choices`.
        SettingError: see `confsteer.tuning.parameters.parameters_of`.
        NoNeuronsError, ProfileMismatchError: see `confsteer.steer`.
        TypeError: a keyword is not in `AnswerTuningSettings`.
    """
    began = time.monotonic()
    own = {name: defaults.TUNING[name] for name in AnswerTuningSettings.__annotations__}
    given = defaults.with_defaults("tune_answers", settings, own)
    parameters, progress = given["parameters"], given["progress"]
    ways = parameters_of(profile, parameters)
    reader, splits = Reader(model, profile), []
    for source, asked in questions.items():
        for wording in wordings:
            sample = read_choices(reader, tokenizer, asked, source=source, wording=wording, progress=progress)
            splits.append(split_questions(sample, wording, given["seed"]))

    # Search on a sample of the vocabulary.
    for one in splits:
        for part in (one.train, one.stop):
            part.reading.draw_sample()
    steering, steps = _search(ways, splits, given["ridge"], progress)

    # Judge the stored steering, as rounded, over the whole vocabulary. Fit both temperatures to the parts that were tuned on.
    steered = profile.intervention(steering)
    temperatures = [_fit_temperature([one.train for one in splits], which) for which in (steered, _neutral(reader))]
    gains = [_gain(one.validation, steered, *temperatures, seed=number) for number, one in enumerate(splits)]
    return AnswerTuning(
        model=profile.model.id,
        profile=profile.checksum,
        versions=library_versions(),
        parameters=parameters,
        steering=steering,
        temperature=temperatures[0],
        alone=temperatures[1],
        questions={name: sum(len(getattr(one, name).questions) for one in splits) for name in AnswerSplit._fields[:-1]},
        validation=mean(gains).interval,
        choices=tuple(_report(one, steering, steered, *temperatures) for one in splits),
        steps=steps,
        seconds=time.monotonic() - began,
    )


def split_questions(sample: ChoiceSample, wording: Wording, seed: int) -> AnswerSplit:
    """Cut questions into four parts that share no passage.

    Raises:
        CorpusError: there are too few.
    """
    blocks = sample.block.unique()
    if len(blocks) < MIN_BLOCKS:
        raise CorpusError(
            f"{sample.source}: {len(blocks)} {sample.unit} are too few to tune on, to stop by, to validate and to report "
            f"on; give {MIN_BLOCKS} or more"
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    ends = [round(len(blocks) * share) for share in torch.tensor(SPLITS).cumsum(dim=0).tolist()]
    train, stop, validation, test = (
        sample.at(torch.isin(sample.block, blocks[order[first:last]]).nonzero()[:, 0])
        for first, last in zip([0, *ends[:-1]], ends, strict=True)
    )
    return AnswerSplit(train, stop, validation, test, wording)


def _search(
    ways: NeuronParameters | DialParameters, splits: Sequence[AnswerSplit], ridge: float, progress: bool
) -> tuple[Steering, int]:
    """Find the parameters, the logarithm of a temperature last, with the least loss on answers of the first parts."""

    def value_and_gradient(at: Tensor) -> tuple[Tensor, Tensor]:
        found = [answer_loss_and_gradient(one.train, ways, at) for one in splits]
        values, gradients = zip(*found, strict=True)
        return sum(values, torch.zeros(())) / len(found), sum(gradients, torch.zeros_like(at)) / len(found)

    def score(at: Tensor) -> float:
        losses = []
        for one in splits:
            nll = one.stop.reading.sampled_scores(ways.intervention(at)).nll
            losses.append(_loss(one.stop.summed(-nll) / float(temperature(at[-1])), one.stop.gold))
        return sum(losses) / len(losses)

    # Begin with the temperature alone, so that the further gain is the neurons'.
    start = torch.zeros(ways.number + 1)
    start[-1] = math.log(_fit_temperature([one.train for one in splits], None))
    start[-1].clamp_(-4.6, 4.6)
    with progress_bar("tune on answers", MAX_STEPS, "step", show=progress) as bar:

        def on_step(step: int, reached: float) -> None:
            bar.set_postfix(validation=f"{reached:.4f}", refresh=False)
            bar.update()

        best, steps = minimise(value_and_gradient, start, score=score, ridge=ridge, on_step=on_step)
    return ways.steering(best), steps


def answer_loss_and_gradient(sample: ChoiceSample, ways: NeuronParameters | DialParameters, at: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss of answers on the sample of the vocabulary, and its gradient.

    The loss depends on a token only through its log-probability. Its slope by the log-likelihood of choice c is
    ``(p_c − [c is right]) / T`` over the number of questions.

    Args:
        sample: questions, with their vocabulary sampled.
        ways: parameters, which become an intervention.
        at: parameters, the logarithm of the temperature last, ``[ways.number + 1]``.
    """
    heat = temperature(at[-1]).double()
    nll = sample.reading.sampled_scores(ways.intervention(at)).nll
    score = sample.summed(-nll) / heat
    right = torch.nn.functional.one_hot(sample.gold, score.shape[1])
    surplus = (score.softmax(dim=-1) - right) / len(sample.questions)
    of_choice = surplus[sample.inside] / heat
    weight = -of_choice[sample.reading.states.window.cpu()].float()

    def per_token(part: SampledLogits, rows: slice) -> Tensor:
        return weight[rows].to(part.logits.device) * (part.log_sum - part.of_target)

    _, gradient = sum_and_gradient(ways.intervention, at, sample.reading, per_token)
    # Take the slope by log T, where T = exp(log T) divides all scores.
    gradient[-1] = -(surplus * score.masked_fill(~sample.inside, 0)).sum()
    return torch.tensor(_loss(score, sample.gold)), gradient


def _loss(score: Tensor, gold: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(score, gold))


def _neutral(reader: Reader) -> Intervention:
    return Intervention.neutral(len(reader.neurons))


def _log_likelihood(sample: ChoiceSample, intervention: Intervention) -> Tensor:
    (found,) = sample.log_likelihoods([intervention])
    return found


def _fit_temperature(samples: Sequence[ChoiceSample], intervention: Intervention | None) -> float:
    """Fit one temperature to the answers of several sets. Without an intervention, fit it to the unsteered model's."""
    which = Intervention.neutral(samples[0].reading.readout.n_neurons) if intervention is None else intervention
    scores = [_log_likelihood(sample, which) for sample in samples]
    most = max(score.shape[1] for score in scores)
    padded = [torch.nn.functional.pad(score, (0, most - score.shape[1]), value=-math.inf) for score in scores]
    return fit_answer_temperature(torch.cat(padded), torch.cat([sample.gold for sample in samples]))


def _gain(sample: ChoiceSample, steered: Intervention, tuned: float, alone: float, *, seed: int) -> Resampled:
    """Subtract the loss with the temperature alone from that of the tuned steering with its own."""
    neutral = Intervention.neutral(sample.reading.readout.n_neurons)
    with_it, without = sample.log_likelihoods([steered, neutral])
    blocks = Blocks(sample.block, seed=seed)

    def loss(score: Tensor) -> Resampled:
        return blocks.mean(-score.log_softmax(dim=-1).gather(1, sample.gold[:, None])[:, 0])

    return loss(with_it / tuned) - loss(without / alone)


def _report(one: AnswerSplit, steering: Steering, steered: Intervention, tuned: float, alone: float) -> ChoiceComparison:
    """Compare on the test part, to which nothing was fitted."""
    sample = one.test
    neutral, with_it = sample.log_likelihoods([Intervention.neutral(sample.reading.readout.n_neurons), steered])
    scores = with_it / tuned
    matched = match_answer_entropy(neutral, answer_entropy(scores))
    alike = torch.zeros_like(neutral).masked_fill(~sample.inside, -math.inf)
    candidates = [
        AnswerCandidate("neutral", "neutral", neutral, Steering()),
        AnswerCandidate("chance", "chance", alike),
        AnswerCandidate("fitted temperature", "temperature", neutral / alone, values=(alone,)),
        AnswerCandidate("tuned", "steering", scores, steering, (tuned,)),
        AnswerCandidate("temperature, entropy as tuned", "matched temperature", neutral / matched, steering, (matched,)),
    ]
    return compare_answers(sample, candidates, wording=one.wording)
