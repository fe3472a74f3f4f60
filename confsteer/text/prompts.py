"""Prompts made from questions: built-in wordings, the user's templates, few-shot examples, chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from confsteer.errors import CorpusError, SettingError
from confsteer.text.questions import Question
from confsteer.text.short_questions import ShortQuestion
from confsteer.text.windows import apply_chat_template

AnswerForm = Literal["text", "letters"]
"""Form of an answer: the text of a choice, or its letter."""
TEXT = "{% if passage %}{{ passage }}\n{% endif %}Question: {{ question }}\nAnswer:"
"""lm-eval's wording of ARC, PIQA and SciQ."""
LETTERS = (
    "{% if passage %}{{ passage }}\n{% endif %}{{ question }}\n"
    "{% for letter, choice in lettered %}{{ letter }}. {{ choice }}\n{% endfor %}Answer:"
)
"""lm-eval's wording of MMLU."""
SHORT_CHAT = (
    "{% if kind == 'number' %}Work the answer out, and end with the number after '#### '.\n"
    "{% else %}Answer with a few words, without a sentence around them.\n{% endif %}"
    "{% if passage %}{{ passage }}\n{% endif %}Question: {{ question }}"
)
"""Wording that asks a chat model for a short answer, which can be compared."""
BETWEEN_SHOTS = "\n\n"


class Asked(NamedTuple):
    """A question as a model reads it."""

    contexts: tuple[str, ...]
    """Text before each choice."""
    continuations: tuple[str, ...]
    """Text of each choice. Its likelihood is what counts."""
    rendered: bool = False
    """Whether a chat template has written the special tokens. Then the tokenizer adds none."""

    def verbatim(self, number: int = 0) -> str:
        """Join a choice to the text before it."""
        return self.contexts[number] + self.continuations[number]


class Wording(NamedTuple):
    """Words for questions.

    The user's template is jinja. It is given ``question``, ``passage``, ``choices``, ``letters``, ``lettered`` (pairs of both)
    and the record's other fields by name. It writes everything before the answer.
    """

    form: AnswerForm = "text"
    template: str | None = None
    """Jinja source. None: the built-in wording of the form."""
    chat: bool = False
    """Whether the question is a user's turn in a chat, and a choice the model's answer."""
    shots: tuple[Question, ...] = ()
    """Example questions to put before it, with their right answers."""

    @property
    def title(self) -> str:
        """Name for reports: ``letters, chat, 5 examples``."""
        return ", ".join(filter(None, [self.form, *_manner(self.template, self.chat, self.shots)]))

    @property
    def plain(self) -> bool:
        """Whether it is only the built-in wording of the choices' text."""
        return self == AS_TEXT

    def ask(self, question: Question, tokenizer: PreTrainedTokenizerBase, where: str = "question") -> Asked:
        """Put a question in words.

        Args:
            question: to be answered.
            tokenizer: its chat template is taken for a chat.
            where: the question is from, for messages.

        Raises:
            CorpusError: the template does not fit the question. Or the tokenizer has no chat template, or its template refuses
                the turns. Or lm-eval logged the question, and this wording would ask it in another way.
        """
        if question.kind == "served":
            if not self.plain:
                raise CorpusError(f"{where} is one that lm-eval logged, and is asked as it was there: leave out {self.title}")
            return Asked(question.contexts, question.choices)
        if question.kind == "blank" and self.plain:
            return _partial(question)
        render = _template(self.template or (LETTERS if self.form == "letters" else TEXT))
        prompt = self._prompt(question, render, where)
        answers = self._answers(question)
        shots = [(self._prompt(shot, render, where), self._answers(shot)[shot.answer]) for shot in self.shots]
        context = _after_shots(prompt, shots, tokenizer if self.chat else None, where)
        if self.chat:
            return Asked((context,) * len(answers), answers, rendered=True)
        return Asked((context,) * len(answers), tuple(_joint(prompt) + answer for answer in answers))

    def _prompt(self, question: Question, render: Callable[..., str], where: str) -> str:
        """Write everything before the answer."""
        if question.kind == "completion" and self.form == "text" and self.template is None:
            return question.question
        letters = ascii_uppercase[: len(question.choices)]
        known: dict[str, Any] = {
            "question": question.question,
            "passage": question.passage,
            "choices": question.choices,
            "letters": letters,
            "lettered": [*zip(letters, question.choices, strict=False)],
        }
        return _rendered(render, {**known, **question.record, **known}, where)

    def _answers(self, question: Question) -> tuple[str, ...]:
        return tuple(ascii_uppercase[: len(question.choices)]) if self.form == "letters" else question.choices


AS_TEXT = Wording()
"""The built-in wording of the choices' text."""


class ShortWording(NamedTuple):
    """Words for questions to which the model writes the answer.

    The user's template is jinja. It is given ``question``, ``passage``, ``kind`` and the record's other fields by name.
    """

    template: str | None = None
    """Jinja source. None: the built-in wording."""
    chat: bool = False
    """Whether the question is a user's turn in a chat."""
    shots: tuple[ShortQuestion, ...] = ()
    """Example questions to put before it, with their answers."""

    @property
    def title(self) -> str:
        """Name for reports: ``own words, chat, 5 examples``."""
        return ", ".join(filter(None, ["own words", *_manner(self.template, self.chat, self.shots)]))

    def ask(self, question: ShortQuestion, tokenizer: PreTrainedTokenizerBase, where: str = "question") -> str:
        """Put a question in words: everything that the model reads before it writes, special tokens of a chat included.

        Args:
            question: to be answered.
            tokenizer: its chat template is taken for a chat.
            where: the question is from, for messages.

        Raises:
            CorpusError: see `Wording.ask`.
        """
        if question.context:
            if self != IN_WORDS:
                raise CorpusError(f"{where} is one that lm-eval logged, and is asked as it was there: leave out {self.title}")
            return question.context
        render = _template(self.template or (SHORT_CHAT if self.chat else TEXT))
        shots = [(self._prompt(shot, render, where), shot.worked or shot.answers[0]) for shot in self.shots]
        return _after_shots(self._prompt(question, render, where), shots, tokenizer if self.chat else None, where)

    def _prompt(self, question: ShortQuestion, render: Callable[..., str], where: str) -> str:
        known = {"question": question.question, "passage": question.passage, "kind": question.kind}
        return _rendered(render, {**known, **question.record, **known}, where)


IN_WORDS = ShortWording()
"""The built-in wording, as text."""


def _manner(template: str | None, chat: bool, shots: Sequence[object]) -> list[str]:
    """Describe how a question is asked, in parts that are empty if there is nothing to say."""
    examples = f"{len(shots)} example{'s' if len(shots) > 1 else ''}" if shots else ""
    return ["own template" if template else "", "chat" if chat else "", examples]


def _rendered(render: Callable[..., str], known: Mapping[str, Any], where: str) -> str:
    """Write a prompt from a template and the values that it may name."""
    from jinja2 import TemplateError

    try:
        prompt = render(**known)
    except (TemplateError, TypeError, ValueError) as error:
        raise CorpusError(f"{where}: the template does not fit it: {error}; it has {', '.join(known)}") from error
    if not prompt.strip():
        raise CorpusError(f"{where}: the template writes nothing")
    return prompt


def _after_shots(prompt: str, shots: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """Put a prompt after examples and their answers: as text, or as turns of a chat if a tokenizer is given."""
    if tokenizer is None:
        return "".join(shot + _joint(shot) + answer + BETWEEN_SHOTS for shot, answer in shots) + prompt
    turns: list[dict[str, str]] = []
    for shot, answer in shots:
        turns += [{"role": "user", "content": shot}, {"role": "assistant", "content": answer}]
    return apply_chat_template([*turns, {"role": "user", "content": prompt}], tokenizer, where, answer=True)


def _joint(prompt: str) -> str:
    """Put a space between prompt and answer, unless the prompt ends in one."""
    return "" if prompt[-1:].isspace() else " "


def _partial(question: Question) -> Asked:
    """Fill the blank with each choice, and score the rest of the sentence after it, as lm-eval's WinoGrande does."""
    before, _, after = question.question.partition("_")
    rest = f" {after.strip()}"
    if not rest.strip():
        # Score the choices themselves: nothing comes after the blank.
        before = before.rstrip()
        return Asked((before,) * len(question.choices), tuple(f" {choice}" for choice in question.choices))
    return Asked(tuple(before + choice for choice in question.choices), (rest,) * len(question.choices))


def _template(text: str) -> Callable[..., str]:
    """Compile a jinja template in a sandbox, because its file may come from anyone."""
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text).render
    except TemplateSyntaxError as error:
        raise SettingError(f"the template is no jinja: line {error.lineno}: {error.message}") from error


def read_template(given: str) -> str:
    """Read a template from a file, or take the given text if it has ``{{ … }}`` in it.

    Raises:
        SettingError: it is neither, cannot be read, or is not jinja.
    """
    text = given
    if "{{" not in given:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise SettingError(
                f"{given[:80]!r} is neither a file with a template nor a template with {{{{ … }}}} in it"
            ) from error
    _template(text)
    return text
