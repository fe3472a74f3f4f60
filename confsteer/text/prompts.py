"""Questions in the words a model is asked in: built-in wordings, templates of the user's, few-shot examples, chats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from confsteer.errors import CorpusError, SettingError
from confsteer.text.questions import Question
from confsteer.text.windows import apply_chat_template

AnswerForm = Literal["text", "letters"]
"""Whether a model answers with the text of a choice or with its letter."""
TEXT = "{% if passage %}{{ passage }}\n{% endif %}Question: {{ question }}\nAnswer:"
"""lm-eval's wording of ARC, PIQA and SciQ."""
LETTERS = (
    "{% if passage %}{{ passage }}\n{% endif %}{{ question }}\n"
    "{% for letter, choice in lettered %}{{ letter }}. {{ choice }}\n{% endfor %}Answer:"
)
"""lm-eval's wording of MMLU."""
BETWEEN_SHOTS = "\n\n"


class Asked(NamedTuple):
    """A question as a model reads it."""

    contexts: tuple[str, ...]
    """Text before each choice."""
    continuations: tuple[str, ...]
    """Text of each choice, whose likelihood counts."""
    rendered: bool = False
    """Whether a chat template has written the special tokens, so that the tokenizer adds none."""

    def verbatim(self, number: int = 0) -> str:
        """Join a choice to what comes before it."""
        return self.contexts[number] + self.continuations[number]


class Wording(NamedTuple):
    """Words for questions.

    A template of the user's is jinja, and gets ``question``, ``passage``, ``choices``, ``letters``, ``lettered`` (pairs of both)
    and the record's other fields by name. It writes all that comes before the answer.
    """

    form: AnswerForm = "text"
    template: str | None = None
    """Jinja; the built-in wording of the form if None."""
    chat: bool = False
    """Whether the question is a user's turn, and a choice the model's answer."""
    shots: tuple[Question, ...] = ()
    """Questions that stand before it with their right answers."""

    @property
    def title(self) -> str:
        """Name for reports: ``letters, chat, 5 examples``."""
        examples = f"{len(self.shots)} example{'s' if len(self.shots) > 1 else ''}" if self.shots else ""
        parts = [self.form, "own template" if self.template else "", "chat" if self.chat else "", examples]
        return ", ".join(filter(None, parts))

    @property
    def plain(self) -> bool:
        """Whether it is the built-in wording of the choices' text and nothing else."""
        return self == AS_TEXT

    def ask(self, question: Question, tokenizer: PreTrainedTokenizerBase, where: str = "question") -> Asked:
        """Put a question in words.

        Args:
            question: to be answered.
            tokenizer: its chat template is taken for a chat.
            where: the question is from, for messages.

        Raises:
            CorpusError: the template does not fit the question; or the tokenizer has no chat template, or it refuses the turns;
                or the question was asked before, as lm-eval logged it, and is to be asked otherwise.
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
        if not self.chat:
            before = "".join(self._example(shot, render, where) + BETWEEN_SHOTS for shot in self.shots)
            return Asked((before + prompt,) * len(answers), tuple(_joint(prompt) + answer for answer in answers))
        turns: list[dict[str, str]] = []
        for shot in self.shots:
            asked, right = self._prompt(shot, render, where), self._answers(shot)[shot.answer]
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": right}]
        turns.append({"role": "user", "content": prompt})
        context = apply_chat_template(turns, tokenizer, where, answer=True)
        return Asked((context,) * len(answers), answers, rendered=True)

    def _example(self, shot: Question, render: Callable[..., str], where: str) -> str:
        prompt = self._prompt(shot, render, where)
        return prompt + _joint(prompt) + self._answers(shot)[shot.answer]

    def _prompt(self, question: Question, render: Callable[..., str], where: str) -> str:
        """Write what comes before the answer."""
        from jinja2 import TemplateError

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
        try:
            prompt = render(**{**question.record, **known})
        except (TemplateError, TypeError, ValueError) as error:
            raise CorpusError(
                f"{where}: the template does not fit it: {error}; it has {', '.join([*known, *question.record])}"
            ) from error
        if not prompt.strip():
            raise CorpusError(f"{where}: the template writes nothing")
        return prompt

    def _answers(self, question: Question) -> tuple[str, ...]:
        return tuple(ascii_uppercase[: len(question.choices)]) if self.form == "letters" else question.choices


AS_TEXT = Wording()
"""The built-in wording of the choices' text."""


def _joint(prompt: str) -> str:
    """Put a space between prompt and answer, where the prompt does not end in one."""
    return "" if prompt[-1:].isspace() else " "


def _partial(question: Question) -> Asked:
    """Fill the blank with each choice, and ask how likely the rest of the sentence then is, as lm-eval's WinoGrande does."""
    before, _, after = question.question.partition("_")
    rest = f" {after.strip()}"
    if not rest.strip():
        # Nothing comes after the blank: the choices themselves are what differs.
        before = before.rstrip()
        return Asked((before,) * len(question.choices), tuple(f" {choice}" for choice in question.choices))
    return Asked(tuple(before + choice for choice in question.choices), (rest,) * len(question.choices))


def _template(text: str) -> Callable[..., str]:
    """Compile a jinja template; it comes from a file that may be anyone's, and can reach nothing."""
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text).render
    except TemplateSyntaxError as error:
        raise SettingError(f"the template is no jinja: line {error.lineno}: {error.message}") from error


def read_template(given: str) -> str:
    """Read a template from a file, or take the text itself, which has ``{{ … }}`` in it.

    Raises:
        SettingError: it is neither, cannot be read, or is no jinja.
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
