"""Options that several commands have, and what they turn into."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click
from click.shell_completion import CompletionItem
from rich.console import Console

from confsteer.files import shipped_profiles, write_result
from confsteer.report.tables import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pydantic import BaseModel

    from confsteer.evaluation.evaluate import Evaluation
    from confsteer.profile.profile import Profile
    from confsteer.text.sources import TextSource
    from confsteer.tuning.tune import Tuning

EXIT_NO_NEURONS = 3
EXIT_NOTHING_GAINED = 4
NO_TEXT = "give some text: --text PATH or --dataset HUB_ID"
TEXT_FILE = click.Path(path_type=Path, dir_okay=False)


class _OutputFile(click.Path):
    """A file that can be written: said before hours of work, not after."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        file = Path(str(super().convert(value, param, ctx)))
        if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            self.fail(f"{file}: the folder {str(file.parent)!r} is not there, or cannot be written to", param, ctx)
        return file


class _PictureFile(_OutputFile):
    """An output file whose name says in which format to draw."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        file = super().convert(value, param, ctx)
        if file.suffix.lower() not in PICTURES:
            self.fail(f"{file}: a picture's name ends in {', '.join(PICTURES)}", param, ctx)
        return file


class _ProfileName(click.types.StringParamType):
    """A profile; the shell offers folders and the names of shipped ones."""

    name = "profile"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in shipped_profiles() if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="dir"), *names]


class _SteeringText(click.types.StringParamType):
    """A steering; the shell offers examples that teach its words."""

    name = "steering"
    examples: ClassVar = {
        "entropy=+0.2": "nats: less confident",
        "entropy=-0.2": "nats: more confident",
        "unigram=+0.1": "nats closer to the unigram distribution",
        "scale.entropy=0": "ablate the entropy neurons",
        "positions=generated": "leave the prompt alone",
        "preset=calibrated": "what confsteer tune saved",
    }

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word, help=why) for word, why in self.examples.items() if word.startswith(incomplete)]


PICTURES = (".png", ".svg", ".pdf", ".jpg")
OUTPUT_FILE = _OutputFile(path_type=Path, dir_okay=False, writable=True)
PROFILE = _ProfileName()
STEERING = _SteeringText()
PICTURE_FILE = _PictureFile(path_type=Path, dir_okay=False, writable=True)


def model_options(command: Any) -> Any:
    for option in reversed(
        [
            click.argument("model", required=False),
            click.option("--device", help="cpu, cuda, cuda:1, or auto to spread over devices.  [default: CUDA if there is one]"),
            click.option(
                "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
            ),
            click.option("--revision", help="Branch, tag or commit on the hub."),
            click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
        ]
    ):
        command = option(command)
    return command


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """The text options of a command."""

    texts: tuple[Path, ...]
    dataset: str | None
    config: str | None
    split: str | None
    field: str | None
    chat: bool
    join: bool

    def sources(self, model: str | None, part: Literal["calibration", "held-out"]) -> list[TextSource]:
        """Each --text for itself, or the dataset; the bundled model has a text of its own, others have none if none is given."""
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
        """Every --text as one."""
        sources = self.sources(model, part)
        return sources[0].model_copy(update={"text": self.texts}) if sources else None


def text_options(command: Any) -> Any:
    @functools.wraps(command)
    def with_text(**options: Any) -> Any:
        text = TextOptions(**{field.name: options.pop(field.name) for field in dataclasses.fields(TextOptions)})
        return command(text=text, **options)

    for option in reversed(
        [
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
            click.option(
                "--field",
                metavar="NAME",
                help="What a JSON object calls its text.  [default: text; with --chat, messages]",
            ),
            click.option("--chat", is_flag=True, help="Conversations, read through the tokenizer's chat template."),
            click.option("--join", is_flag=True, help="Let windows cross documents: join texts with EOS, as pre-training does."),
        ]
    ):
        with_text = option(with_text)
    return with_text


window_option = click.option("--window", default=256, show_default=True, type=int, help="Tokens per window.")
json_option = click.option("--json", "as_json", type=OUTPUT_FILE, metavar="FILE", help="Write the results as JSON.")
plot_option = click.option("--plot", type=PICTURE_FILE, metavar="FILE.png", help="Draw the results.")
report_option = click.option(
    "--report", type=OUTPUT_FILE, metavar="FILE.html", help="Write a report with pictures, as confsteer report does."
)

profile_option = click.option("-p", "--profile", required=True, type=PROFILE, help="Folder, shipped name or hub repository.")
steer_option = click.option(
    "-s",
    "--steer",
    "steers",
    multiple=True,
    type=STEERING,
    help='Such as "entropy=0.3", "unigram=-0.1 scale.757=0", "clamp.757=0:2", or JSON; repeatable.',
)


def write(console: Console, result: BaseModel, as_json: Path | None, plot: Path | None, draw: str) -> None:
    """What the options `json_option` and `plot_option` ask for."""
    write_json(console, result, as_json)
    if plot:
        from confsteer.report import plots

        write_picture(console, getattr(plots, draw)(result), plot)


def write_picture(console: Console, figure: Figure, file: Path) -> None:
    """In the format that the file's name says."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:].lower())
    write_result(file, picture.getvalue())
    console.print(f"Drawn: {escape(str(file))}")


def write_json(console: Console, result: BaseModel, file: Path | None) -> None:
    """What the option `json_option` asks for."""
    if file:
        write_result(file, (result.model_dump_json(indent=1) + "\n").encode())
        console.print(f"Written: {escape(str(file))}")


def write_html(console: Console, result: Evaluation | Tuning, file: Path | None, profile: Profile) -> None:
    """What the option `report_option` asks for."""
    if file:
        from confsteer.report.page import write_report

        write_report(result, file, profile)
        console.print(f"Written: {escape(str(file))}")


def load(model: str | None, loading: dict[str, Any]) -> Any:
    """The model that `model_options` name."""
    from confsteer.model.loading import load_model

    return load_model(model, **loading)
