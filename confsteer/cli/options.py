"""Options that several commands share, each group as one argument of the command."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console

from confsteer import defaults
from confsteer.files import shipped_profiles, write_result
from confsteer.report import tables
from confsteer.report.columns import TableConsole
from confsteer.report.tables import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pydantic import BaseModel

    from confsteer.evaluation.evaluate import Evaluation
    from confsteer.model.loading import LoadedModel
    from confsteer.profile.profile import Profile
    from confsteer.text.questions import QuestionSource
    from confsteer.text.sources import TextSource
    from confsteer.text.windows import Windows
    from confsteer.tuning.tune import Tuning
    from confsteer.tuning.tune_answers import AnswerTuning

Written = TypeVar("Written", bound="BaseModel")
EXIT_NO_NEURONS = 3
EXIT_NOTHING_GAINED = 4
EXIT_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as in shells."""
NO_TEXT = "give some text: --text PATH or --dataset HUB_ID"
TEXT_FILE = click.Path(path_type=Path, dir_okay=False)


class _OutputFile(click.Path):
    """A file that can be written. One that cannot is refused before hours of work, not after."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        file = Path(str(super().convert(value, param, ctx)))
        if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            self.fail(f"{file}: the folder {str(file.parent)!r} is not there, or cannot be written to", param, ctx)
        return file


class _PictureFile(_OutputFile):
    """An output file whose suffix gives the format of the picture."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        file = super().convert(value, param, ctx)
        if file.suffix.lower() not in PICTURES:
            self.fail(f"{file}: a picture's name ends in {', '.join(PICTURES)}", param, ctx)
        return file


class _ProfileName(click.types.StringParamType):
    """A profile. The shell completes folders and the names of shipped ones."""

    name = "profile"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in shipped_profiles() if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="dir"), *names]


class _SteeringText(click.types.StringParamType):
    """A steering. The shell completes examples, which show its words."""

    name = "steering"
    examples: ClassVar = {
        "entropy=+0.2": "nats: less confident",
        "entropy=-0.2": "nats: more confident",
        "unigram=+0.1": "nats closer to the unigram distribution",
        "scale.entropy=0": "ablate the entropy neurons",
        "positions=generated": "leave the prompt alone",
        "positions=after:</think>": "only once the model has written that",
        "positions=first:20": "only the first tokens of the answer",
        "preset=calibrated": "what confsteer tune saved",
    }

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word, help=why) for word, why in self.examples.items() if word.startswith(incomplete)]


PICTURES = (".png", ".svg", ".pdf", ".jpg")
OUTPUT_FILE = _OutputFile(path_type=Path, dir_okay=False, writable=True)
PROFILE = _ProfileName()
STEERING = _SteeringText()
PICTURE_FILE = _PictureFile(path_type=Path, dir_okay=False, writable=True)


def grouped(name: str, group: type, *options: Any) -> Callable[[Any], Any]:
    """Add options to a command. It gets their values as one argument.

    Args:
        name: name of the argument.
        group: a dataclass whose fields have the names of the options' values. Fields without an option need a default.
        *options: decorators of click or groups of their own, in the order of ``--help``.

    Returns:
        A decorator of the command's function.
    """

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def with_group(**given: Any) -> Any:
            values = {field.name: given.pop(field.name) for field in dataclasses.fields(group) if field.name in given}
            return command(**{name: group(**values)}, **given)

        for option in reversed(options):
            with_group = option(with_group)
        return with_group

    return decorate


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Model that a command runs, and settings for loading it."""

    model: str | None
    """Hub id, folder or GGUF file; the bundled model if None."""
    gguf_file: str | None
    device: str | None
    dtype: str
    revision: str | None
    trust_remote_code: bool

    def load(self) -> LoadedModel:
        """Load the model and its tokenizer."""
        from transformers.utils import logging

        from confsteer.model.loading import load_model

        # Hide transformers' bars: commands have bars of their own for long work.
        logging.disable_progress_bar()
        settings = dataclasses.asdict(self)
        return load_model(settings.pop("model"), **settings)


gguf_option = click.option("--gguf", "gguf_file", metavar="FILE", help="GGUF file of the hub repository or folder MODEL.")
revision_option = click.option("--revision", help="Branch, tag or commit on the hub.")
trust_option = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
model_options = grouped(
    "chosen",
    ModelOptions,
    click.argument("model", required=False),
    gguf_option,
    click.option("--device", help="cpu, cuda, cuda:1, or auto to spread over devices.  [default: CUDA if there is one]"),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True),
    revision_option,
    trust_option,
)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Text that a command reads."""

    texts: tuple[Path, ...]
    dataset: str | None
    config: str | None
    split: str | None
    field: str | None
    chat: bool
    join: bool = False

    def sources(self, model: str | None, part: Literal["calibration", "held-out"]) -> list[TextSource]:
        """Make a source of each --text, or of the dataset.

        The bundled model has a text of its own. Other models have none if none is given.
        """
        from confsteer.text.sources import TextSource

        if self.texts and self.dataset:
            raise click.UsageError("give --text or --dataset, not both")
        if not self.dataset and (self.config or self.split):
            raise click.UsageError("--config and --split go with --dataset")
        how: dict[str, Any] = {"field": self.field, "chat": self.chat, "join": self.join}
        if self.dataset:
            return [TextSource(dataset=self.dataset, config=self.config, split=self.split, **how)]
        if self.texts:
            return [TextSource(text=(path,), **how) for path in self.texts]
        if any(how.values()):
            raise click.UsageError("--field, --chat and --join go with --text or --dataset")
        return [TextSource(bundled=part)] if model is None else []

    def source(self, model: str | None, part: Literal["calibration", "held-out"]) -> TextSource | None:
        """Make one source of all --text options."""
        sources = self.sources(model, part)
        return sources[0].model_copy(update={"text": self.texts}) if sources else None


@dataclasses.dataclass(frozen=True)
class WindowedTextOptions(TextOptions):
    """Text that a command reads, with the size of windows and a limit of tokens."""

    _: dataclasses.KW_ONLY
    window: int
    """Tokens per window."""
    tokens: int | None
    """Most tokens to read; all if None."""

    def windows(self, source: TextSource, loaded: LoadedModel) -> Windows:
        """Cut a text into windows of the model's tokens, and of images where a conversation has them."""
        return source.windows(loaded.tokenizer, self.window, self.tokens, loaded.load_processor)


_TEXT = (
    click.option(
        "--text",
        "texts",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="PATH",
        help="File or folder, repeatable: .json is a list of documents, .jsonl has one per line, any other file is one; "
        "all may be gzipped (.gz).",
    ),
    click.option("--dataset", metavar="HUB_ID", help="Dataset on the hub or in a local folder, streamed."),
    click.option("--config", metavar="NAME", help="The dataset's configuration, where it has several."),
    click.option("--split", metavar="NAME", help="The dataset's split.  [default: train]"),
    click.option("--field", metavar="NAME", help="What a JSON object calls its text.  [default: text; with --chat, messages]"),
    click.option(
        "--chat",
        is_flag=True,
        help="Conversations, with images for models that see (or questions), through the model's chat template.",
    ),
    click.option("--join", is_flag=True, help="Let windows cross documents: join texts with EOS, as pre-training does."),
)
text_options = grouped("text", TextOptions, *_TEXT)
corpus_options = grouped("text", TextOptions, *_TEXT[:-1])
"""Options of a text that is not cut into windows."""


def windowed_text_options(tokens: int | None, tokens_help: str = "Read at most this many.") -> Callable[[Any], Any]:
    """Add the options of a text that is read in windows.

    Args:
        tokens: default for the most tokens to read; None for all.
        tokens_help: help of the option ``--tokens``.
    """
    return grouped(
        "text",
        WindowedTextOptions,
        *_TEXT,
        click.option("--window", default=defaults.WINDOW, show_default=True, type=int, help="Tokens per window."),
        click.option("--tokens", default=tokens, show_default=tokens is not None, type=click.IntRange(min=1), help=tokens_help),
    )


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """Multiple-choice questions, and how to ask them."""

    choices: tuple[Path, ...]
    formats: tuple[Literal["text", "letters"], ...]
    template: str | None
    shots: Path | None
    limit: int | None

    def sources(self, text: TextOptions, short: bool = False) -> list[QuestionSource]:
        """Make a source of each --choices, and of the --dataset if its records are questions.

        Args:
            text: options that name the dataset.
            short: whether there are other questions, to which the model writes the answer.

        Raises:
            click.UsageError: an option for questions was given, but no question.
        """
        from confsteer.text.questions import QuestionSource

        found = [QuestionSource(path=path) for path in self.choices]
        if text.dataset and not text.field:
            dataset = QuestionSource(dataset=text.dataset, config=text.config, split=text.split)
            found += [dataset] if dataset.looks_like_questions() else []
        if short and not found and self.formats:
            raise click.UsageError("--format is for multiple-choice questions: give some with --choices PATH, or leave it out")
        if not (found or short) and (self.formats or self.template or self.shots or self.limit):
            raise click.UsageError("--format, --template, --shots and --limit are for questions: give some with --choices PATH")
        return found

    def wording(self, chat: bool) -> dict[str, Any]:
        """Return the wording in the fields of a run file."""
        how: dict[str, Any] = {"template": self.template, "shots": self.shots, "limit": self.limit, "chat": chat}
        return how | ({"formats": self.formats} if self.formats else {})


question_options = grouped(
    "asked",
    QuestionOptions,
    click.option(
        "--choices",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="PATH",
        help='Multiple-choice questions, a line {"question": ..., "choices": [...], "answer": ...}, or as benchmarks have them; '
        "repeatable.",
    ),
    click.option(
        "--format",
        "formats",
        type=click.Choice(["text", "letters"]),
        multiple=True,
        help="Answer with the text of a choice, or list the choices and answer with a letter; repeatable.  [default: text]",
    ),
    click.option(
        "--template",
        metavar="FILE|JINJA",
        help='Words before the answer, such as "{{ passage }} {{ question }} {% for l, c in lettered %}({{ l }}) {{ c }} '
        "{% endfor %}\"; also the record's own fields.",
    ),
    click.option(
        "--shots", type=TEXT_FILE, metavar="FILE", help="Questions to put before each one with their answers, all of them."
    ),
    click.option("--limit", type=click.IntRange(min=2), metavar="N", help="Draw N questions of each file, the same each time."),
)

profile_option = click.option("-p", "--profile", required=True, type=PROFILE, help="Folder, shipped name or hub repository.")
steer_option = click.option(
    "-s",
    "--steer",
    "steers",
    multiple=True,
    type=STEERING,
    help='Such as "entropy=0.3", "unigram=-0.1 scale.767=0", "clamp.767=0:2", or JSON; repeatable.',
)


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Form in which a command prints its results, and files that it writes them to."""

    as_json: Path | None = None
    plot: Path | None = None
    report: Path | None = None
    wide: bool = False
    as_markdown: bool = False
    as_csv: bool = False

    def __post_init__(self) -> None:
        if self.as_markdown and self.as_csv:
            raise click.UsageError("give --markdown or --csv, not both: each has stdout for itself")

    def console(self) -> TableConsole:
        """Open the output for tables; notes go to stderr where stdout is for Markdown or CSV alone."""
        return tables.console(wide=self.wide, markdown=self.as_markdown or self.as_csv)

    def require_extras(self) -> None:
        """Fail now if an extra is missing, not after hours of work."""
        if self.report:
            import confsteer.report.page  # noqa: F401

    def keep(self, result: BaseModel) -> None:
        """Write the results so far as JSON, if asked."""
        if self.as_json:
            write_result(self.as_json, (result.model_dump_json(indent=1) + "\n").encode())

    def write(self, console: Console, result: Written, draw: Callable[[Written], Figure] | None = None) -> None:
        """Write the results as JSON and as the picture that `draw` makes, if asked."""
        if self.as_json:
            self.keep(result)
            console.print(f"Written: {escape(str(self.as_json))}")
        if self.plot and draw:
            write_picture(console, draw(result), self.plot)

    def write_report(self, console: Console, result: Evaluation | Tuning | AnswerTuning, profile: Profile) -> None:
        """Write the results as HTML, if asked."""
        if self.report:
            from confsteer.report.page import write_report

            write_report(result, self.report, profile)
            console.print(f"Written: {escape(str(self.report))}")


_JSON = click.option("--json", "as_json", type=OUTPUT_FILE, metavar="FILE", help="Write the results as JSON.")
_PLOT = click.option("--plot", type=PICTURE_FILE, metavar="FILE.png", help="Draw the results.")
_REPORT = click.option(
    "--report", type=OUTPUT_FILE, metavar="FILE.html", help="Write a report with pictures, as confsteer report does."
)
wide_option = click.option("--wide", is_flag=True, help="Print all columns, in lines as long as it takes (less -S).")
_MARKDOWN = click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables as Markdown; all else on stderr.")
_CSV = click.option("--csv", "as_csv", is_flag=True, help="Print all rows, columns and digits as CSV; all else on stderr.")
json_and_plot_options = grouped("output", OutputOptions, _JSON, _PLOT)
tuning_output_options = grouped("output", OutputOptions, wide_option, _JSON, _REPORT)
output_options = grouped("output", OutputOptions, wide_option, _MARKDOWN, _CSV, _JSON, _PLOT, _REPORT)


def write_picture(console: Console, figure: Figure, file: Path) -> None:
    """Write a picture in the format of the file's suffix."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:].lower())
    write_result(file, picture.getvalue())
    console.print(f"Drawn: {escape(str(file))}")
