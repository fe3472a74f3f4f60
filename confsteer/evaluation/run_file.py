"""An evaluation as a file, so that it can be run again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confsteer.defaults import SAMPLES, SEED, WINDOW
from confsteer.errors import SettingError, first_problem
from confsteer.evaluation.choices import Answered, answer, field_of
from confsteer.evaluation.evaluate import Evaluation, EvaluationSettings, compare_texts, sweep
from confsteer.evaluation.reader import Reader, interventions_of
from confsteer.evaluation.written import WrittenAnswered, answer_in_words
from confsteer.files import MAX_RUN_FILE_BYTES, read_at_most
from confsteer.model.loading import DEMO_UNIGRAM, LoadedModel
from confsteer.profile.profile import Profile
from confsteer.steering import Steering
from confsteer.studies.induction import InductionStudy, induction
from confsteer.studies.repetition import DEFAULT_REPETITION, check_repetition, natural_cut
from confsteer.text.counts import checked_counts, read_counts
from confsteer.text.prompts import AnswerForm, ShortWording, Wording, read_template
from confsteer.text.questions import Question, QuestionSource, read_questions
from confsteer.text.short_questions import ShortQuestion, ShortQuestionSource, read_short_questions
from confsteer.text.sources import TextSource, by_title

AnyQuestion = TypeVar("AnyQuestion", Question, ShortQuestion)
AnySource = TypeVar("AnySource", bound=QuestionSource)


class Run(BaseModel):
    """A request to ``confsteer eval``. A YAML file has it in the words of the command's options.

    Paths of files and folders are relative to the YAML file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    """Hub id or folder; the bundled model if None."""
    profile: str
    """Folder, shipped name or hub repository."""
    texts: tuple[TextSource, ...] = ()
    """Texts. If there are neither texts nor questions, it is the bundled model's held-out text."""
    steerings: tuple[str, ...] = ()
    """Steerings that `Steering.parse` takes."""
    sweeps: tuple[str, ...] = ()
    """Sweeps that `confsteer.evaluation.evaluate.sweep` takes."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to read of each text; all if None."""
    window: int = WINDOW
    """Tokens per window."""
    unigram: Path | None = None
    """``.npy`` file with token counts; counted in each text if None."""
    choices: tuple[QuestionSource, ...] = ()
    """Multiple-choice questions: files and folders, or datasets."""
    questions: tuple[ShortQuestionSource, ...] = ()
    """Questions to which the model writes the answer: files and folders, or datasets."""
    formats: tuple[AnswerForm, ...] = ("text",)
    """Forms of multiple-choice answers: the text of a choice, or its letter."""
    template: str | None = None
    """Jinja, or a file of it, that writes everything before an answer; see `confsteer.text.prompts.Wording`."""
    chat: bool = False
    """Whether questions go through the tokenizer's chat template."""
    shots: Path | None = None
    """File of example questions, which are put before each question with their answers."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Number of questions to draw at random from each file; all if None."""
    by: str | None = None
    """Field of the multiple-choice questions' records to group them by."""
    samples: Annotated[int, Field(ge=2)] = SAMPLES
    """Number of samples of each answer that the model writes."""
    smooth_ece: bool = False
    """Whether to compute smooth ECE too, which is slow."""
    induction: bool = False
    """Whether to measure repetition too, with the first text as the natural one."""

    @classmethod
    def read(cls, file: Path) -> Run:
        """Read a run from YAML.

        Raises:
            SettingError: it cannot be read, or is not such a file. The sentence names the key.
        """
        import yaml

        try:
            content = yaml.safe_load(read_at_most(file, MAX_RUN_FILE_BYTES))
        except OSError as error:
            raise SettingError(f"cannot read {file}: {error.strerror}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of a 13th month, brackets thousands deep
            raise SettingError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        try:
            return cls.model_validate(content)._beside(file.parent)
        except ValidationError as error:
            problem = first_problem(error, whole="the whole")
            raise SettingError(f"{file}: {problem}; a run has {', '.join(cls.model_fields)}") from error

    def _beside(self, folder: Path) -> Run:
        """Make its paths relative to `folder`, where the YAML file is."""

        def name(value: str | None) -> str | None:
            return str(folder / value) if value and os.path.exists(folder / value) else value

        changed: dict[str, Any] = {"model": name(self.model), "profile": name(self.profile)}
        changed["texts"] = tuple(
            text.model_copy(update={"text": tuple(folder / path for path in text.text), "dataset": name(text.dataset)})
            for text in self.texts
        )
        for key in ("choices", "questions"):
            changed[key] = tuple(
                source.model_copy(update={"path": source.path and folder / source.path, "dataset": name(source.dataset)})
                for source in getattr(self, key)
            )
        changed["shots"] = self.shots and folder / self.shots
        changed["template"] = name(self.template)
        changed["unigram"] = self.unigram and folder / self.unigram
        return self.model_copy(update=changed)

    def all_steerings(self) -> list[Steering]:
        """Read the steerings, those of the sweeps last.

        Raises:
            SteeringError: one is malformed.
        """
        return [*map(Steering.parse, self.steerings), *(one for text in self.sweeps for one in sweep(text))]

    def choice_questions(self) -> dict[str, list[Question]]:
        """Read its multiple-choice questions, by the name of their source.

        Raises:
            CorpusError: a file has no such questions, or a question has no field to group it by.
            SettingError: two files have the same name.
        """
        found = {title: _drawn(source.read(), self.limit) for title, source in _named(self.choices).items()}
        for title, questions in found.items():
            for number, question in enumerate(questions if self.by else (), start=1):
                field_of(question, self.by or "", f"{title}, question {number}")
        return found

    def short_questions(self) -> dict[str, list[ShortQuestion]]:
        """Read the questions to which the model writes the answer, by the name of their source.

        Raises:
            CorpusError: a file has no such questions.
            SettingError: two files have the same name.
        """
        return {title: _drawn(source.read(), self.limit) for title, source in _named(self.questions).items()}

    def wordings(self) -> list[Wording]:
        """Read the wordings of multiple-choice questions.

        Raises:
            CorpusError: the examples are not questions.
            SettingError: the template cannot be read.
        """
        shots = () if self.shots is None else tuple(read_questions([self.shots]))
        return [Wording(form, self._template(), self.chat, shots) for form in dict.fromkeys(self.formats)]

    def short_wording(self) -> ShortWording:
        """Read the wording of short questions; see `wordings`."""
        shots = () if self.shots is None else tuple(read_short_questions([self.shots]))
        return ShortWording(self._template(), self.chat, shots)

    def _template(self) -> str | None:
        return None if self.template is None else read_template(self.template)

    def sources(self) -> dict[str, TextSource]:
        """Give its texts by title.

        Raises:
            CorpusError: two have the same title.
            SettingError: there is neither text nor a question.
        """
        asked = self.choices or self.questions
        sources = self.texts or ((TextSource(bundled="held-out"),) if self.model is None and not asked else ())
        if not (sources or asked):
            raise SettingError("nothing to evaluate on: give texts, or questions (choices, questions)")
        return by_title(sources)


class Stage(NamedTuple):
    """An evaluation so far."""

    result: Evaluation
    answered: Answered | WrittenAnswered | None = None
    """Answers to the last questions, if the stage ends with questions."""


def run(
    settings: Run,
    profile: Profile,
    loaded: LoadedModel,
    questions: Mapping[str, Sequence[Question]] = MappingProxyType({}),
    short: Mapping[str, Sequence[ShortQuestion]] = MappingProxyType({}),
    *,
    progress: bool = False,
) -> Iterator[Stage]:
    """Run the evaluation that `settings` ask for, a file at a time, so that a long run can be kept wherever it ends.

    Args:
        settings: the request.
        profile: the profile that they name, loaded.
        loaded: the model they name, loaded.
        questions: the multiple-choice questions that they name, read.
        short: the questions to which the model writes the answer, read.
        progress: whether to show progress bars.

    Raises:
        ConfsteerError: see `evaluate`, `induction`, `confsteer.evaluation.choices` and `confsteer.evaluation.written`.
    """
    steerings, sources = settings.all_steerings(), settings.sources()
    wordings = settings.wordings() if questions else []
    interventions_of(steerings, profile)
    size = profile.model.tokenizer_size
    counts_file = settings.unigram or (DEMO_UNIGRAM if settings.model is None else None)
    counts = checked_counts(read_counts(counts_file), size) if counts_file else None
    # Begin with short parts that may be refused, so that no long work is lost.
    if settings.induction:
        check_repetition(loaded.model, loaded.tokenizer, DEFAULT_REPETITION)
    tokenizer = loaded.tokenizer
    texts = {
        title: source.windows(tokenizer, settings.window, settings.tokens, loaded.load_processor)
        for title, source in sources.items()
    }
    reader = Reader(loaded.model, profile)
    result = Evaluation.begin(profile, settings.model or "")
    for answered in answer(reader, tokenizer, questions, steerings, wordings=wordings, by=settings.by, progress=progress):
        result = result.model_copy(update={"choices": (*result.choices, answered.comparison)})
        yield Stage(result, answered)
    asking: Any = {"wording": settings.short_wording(), "samples": settings.samples} if short else {}
    for written in answer_in_words(reader, tokenizer, short, steerings, **asking, progress=progress):
        result = result.model_copy(update={"written": (*result.written, written.comparison)})
        yield Stage(result, written)
    how: EvaluationSettings = {"unigram_counts": counts, "smooth_ece": settings.smooth_ece, "progress": progress}
    for text in compare_texts(reader, tokenizer, texts, steerings, **how):
        result = result.model_copy(update={"texts": (*result.texts, text)})
        yield Stage(result)
    if settings.induction:
        study = _study(next(iter(sources.values()), None), profile, loaded, progress)
        yield Stage(result.model_copy(update={"induction": study}))


def _named(sources: Sequence[AnySource]) -> dict[str, AnySource]:
    """Give files of questions by title.

    Raises:
        SettingError: two have the same title.
    """
    names = [source.title for source in sources]
    if len(set(names)) < len(names):
        raise SettingError(f"two files of questions are called {max(names, key=names.count)!r}: they are reported by name")
    return dict(zip(names, sources, strict=True))


def _drawn(questions: list[AnyQuestion], limit: int | None) -> list[AnyQuestion]:
    """Draw some of the questions at random, the same each time, and keep their order."""
    if limit is None or limit >= len(questions):
        return questions
    chosen = sorted(random.Random(SEED).sample(range(len(questions)), limit))
    return [questions[i] for i in chosen]


def _study(natural: TextSource | None, profile: Profile, loaded: LoadedModel, progress: bool) -> InductionStudy:
    """Measure repetition of random tokens, and of `natural` text if there is any."""
    text = natural.windows(loaded.tokenizer, *natural_cut(loaded.tokenizer, DEFAULT_REPETITION)) if natural else None
    return induction(loaded.model, loaded.tokenizer, profile, text=text, progress=progress)
