"""Options that several commands have, and what they turn into."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from pydantic import BaseModel

    from confsteer.corpus import Document, Windows

EXIT_NO_NEURONS = 3
NO_TEXT = "give some text: --text PATH or --dataset HUB_ID"
TEXT_FILE = click.Path(path_type=Path, dir_okay=False)
OUTPUT_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)


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

    def documents(self, model: str | None, part: Literal["calibration", "held-out"]) -> tuple[Iterable[Document], str] | None:
        """Documents and what they are; the bundled model has a text of its own, others have none if none is given."""
        from confsteer.texts import python_docs, read_dataset, read_texts

        if self.texts and self.dataset:
            raise click.UsageError("give --text or --dataset, not both")
        if not self.dataset and (self.config or self.split):
            raise click.UsageError("--config and --split go with --dataset")
        chat = " (conversations)" if self.chat else ""
        if self.dataset:
            split = self.split or "train"
            documents = read_dataset(self.dataset, config=self.config, split=split, field=self.field, chat=self.chat)
            return documents, " ".join(filter(None, ["dataset", self.dataset, self.config, split])) + chat
        if self.texts:
            documents = read_texts(self.texts, field=self.field, chat=self.chat)
            return documents, ", ".join(path.name or str(path) for path in self.texts) + chat
        if self.field or self.chat or self.join:
            raise click.UsageError("--field, --chat and --join go with --text or --dataset")
        return (python_docs(part), f"Python documentation ({part} half)") if model is None else None

    def windows(self, documents: Iterable[Document], source: str, tokenizer: Any, window: int, tokens: int | None) -> Windows:
        from confsteer.corpus import make_windows

        return make_windows(documents, tokenizer, window=window, max_tokens=tokens, cross_documents=self.join, source=source)


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
plot_option = click.option("--plot", type=OUTPUT_FILE, metavar="FILE.png", help="Draw the results.")
profile_option = click.option("-p", "--profile", required=True, metavar="PROFILE", help="Folder, shipped name or hub repository.")
steer_option = click.option(
    "-s",
    "--steer",
    "steers",
    multiple=True,
    metavar="STEERING",
    help='Such as "entropy=0.3", "unigram=-0.1 scale.757=0", "clamp.757=0:2", or JSON; repeatable.',
)


def write(console: Console, result: BaseModel, as_json: Path | None, plot: Path | None, draw: str) -> None:
    """What the options `json_option` and `plot_option` ask for."""
    if as_json:
        as_json.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        console.print(f"Written: {escape(str(as_json))}")
    if plot:
        from confsteer import plots

        getattr(plots, draw)(result).savefig(plot)
        console.print(f"Drawn: {escape(str(plot))}")


def load(model: str | None, loading: dict[str, Any]) -> Any:
    """The model that `model_options` name."""
    from confsteer.loading import load_model

    return load_model(model, **loading)
