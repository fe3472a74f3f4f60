"""The command line. Each command calls one library function and prints what it returns."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from confsteer import tables
from confsteer.errors import ConfsteerError
from confsteer.profile import Profile

if TYPE_CHECKING:
    from pydantic import BaseModel

    from confsteer.corpus import Document, Windows

EXIT_NO_NEURONS = 3
NO_TEXT = "give some text: --text PATH or --dataset HUB_ID"
EVAL_EXTRA = ("datasets", "matplotlib", "torchmetrics")
"""Packages of the extra that not everyone installs."""
TEXT_FILE = click.Path(path_type=Path, dir_okay=False)
OUTPUT_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)


class _Group(click.Group):
    """Errors that confsteer raises on purpose become a sentence and exit code 1, warnings a line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
                return super().invoke(ctx)
        except ConfsteerError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EVAL_EXTRA:
                raise
            raise click.ClickException(f"this needs {package}: pip install 'confsteer[eval]'") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="confsteer")
def main() -> None:
    """Confidence control for language models, with their own neurons.

    \b
    confsteer calibrate MODEL          find the neurons, measure what they do, save a profile
    confsteer scan MODEL               candidates from the weights alone, read off the disk: no text, no model in memory
    confsteer show PROFILE             what a profile holds, as tables or pictures
    confsteer generate -p PROFILE ...  the same prompt at several settings
    confsteer eval -p PROFILE ...      loss, entropy and calibration with and without steering
    confsteer serve MODEL --profile PROFILE   a vLLM server whose requests choose their steering
    confsteer study ... -p PROFILE     measurements of the paper: induction, cumulative ablation

    MODEL is a hub id or a folder; without it the bundled demonstration model is used. PROFILE is a folder, the name of a
    shipped profile (confsteer-demo) or a hub repository.

    Exit codes: 0 done, 1 a clear error, 2 wrong usage, 3 the model has no such neurons.
    """


def _model_options(command: Any) -> Any:
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
class _Text:
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


def _text_options(command: Any) -> Any:
    @functools.wraps(command)
    def with_text(**options: Any) -> Any:
        text = _Text(**{field.name: options.pop(field.name) for field in dataclasses.fields(_Text)})
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


_window_option = click.option("--window", default=256, show_default=True, type=int, help="Tokens per window.")
_json_option = click.option("--json", "as_json", type=OUTPUT_FILE, metavar="FILE", help="Write the results as JSON.")
_plot_option = click.option("--plot", type=OUTPUT_FILE, metavar="FILE.png", help="Draw the results.")
_profile_option = click.option(
    "-p", "--profile", required=True, metavar="PROFILE", help="Folder, shipped name or hub repository."
)
_steer_option = click.option(
    "-s",
    "--steer",
    "steers",
    multiple=True,
    metavar="STEERING",
    help='Such as "entropy=0.3", "unigram=-0.1 scale.757=0", "clamp.757=0:2", or JSON; repeatable.',
)


@main.command()
@_model_options
@_text_options
@_window_option
@click.option("--tokens", default=25_600, show_default=True, type=click.IntRange(min=1), help="Read at most this many.")
@click.option(
    "--unigram",
    type=TEXT_FILE,
    metavar="FILE.npy",
    help="Token counts by id of text like the model's training text.  [default: counted in the text]",
)
@click.option(
    "--null-dims", type=click.IntRange(min=1), help="Size of the unembedding's null space.  [default: from its spectrum]"
)
@click.option(
    "--scan",
    "scanned",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Take the statistics of the weights from a scan of MODEL.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random directions behind the chance levels, and of sampling.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the profile.  [default: NAME.confsteer]")
def calibrate(
    model: str | None,
    text: _Text,
    window: int,
    tokens: int,
    unigram: Path | None,
    null_dims: int | None,
    scanned: Path | None,
    seed: int,
    out: Path | None,
    **loading: Any,
) -> None:
    """Find MODEL's entropy and token-frequency neurons and save a profile.

    \b
    confsteer calibrate             the bundled model on the Python documentation
    confsteer calibrate MODEL       a model on text that it is made to write
    confsteer calibrate MODEL --text a.txt --text folder
    confsteer calibrate MODEL --text corpus.jsonl.gz --field content
    confsteer calibrate MODEL --dataset HUB_ID --split validation
    confsteer calibrate MODEL --text chats.jsonl --chat --unigram counts.npy

    \b
    A line of chats.jsonl: {"messages": [{"role": "user", "content": "Hi"}, ...]}

    Tokens are ranked by how often they occur in the text unless --unigram has their counts in text like the model's training
    text; 25,600 tokens are too few to rank a vocabulary, and a warning says so.
    """
    from confsteer.calibration import calibrate as run
    from confsteer.corpus import read_counts
    from confsteer.loading import DEMO_UNIGRAM
    from confsteer.parallel import join

    first = join().rank == 0
    given = text.documents(model, "calibration")
    counts = read_counts(unigram) if unigram else read_counts(DEMO_UNIGRAM) if model is None else None
    loaded = _load(model, loading)
    if given is None and first:
        click.echo(f"No text given: the model writes its own, {tokens:,} tokens sampled at temperature 1 (seed {seed}).")
    profile = run(
        loaded.model,
        loaded.tokenizer,
        text.windows(*given, loaded.tokenizer, window, tokens) if given else None,
        tokens=tokens,
        window=window,
        unigram_counts=counts,
        null_dims=null_dims,
        scanned=Profile.load(scanned) if scanned else None,
        seed=seed,
        progress=first,
    )
    if not first:
        return
    folder = profile.save(out or Path(f"{Path(profile.model.id).name}.confsteer"))
    tables.print_profile(tables.console(), profile)
    tables.console().print(f"Profile written to {escape(str(folder))}")
    if not profile.response:
        sys.exit(EXIT_NO_NEURONS)


@main.command()
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--null-dims", type=click.IntRange(min=1), help="Size of the unembedding's null space.  [default: from its spectrum]"
)
@click.option("--seed", default=0, show_default=True, help="Of the random directions behind the chance level.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the profile.  [default: NAME.scan.confsteer]"
)
@click.option(
    "--plot",
    type=OUTPUT_FILE,
    metavar="FILE.png",
    help="Draw norm, logit variance, null fraction and the spectrum.",
)
def scan(model: str | None, out: Path | None, plot: Path | None, **settings: Any) -> None:
    """Look for entropy neurons in MODEL's weights alone and save what they say.

    Reads three weights of a safetensors checkpoint, without loading the model: a few percent of its bytes, no text. What is
    found are candidates; what they do is for calibrate to measure.

    \b
    confsteer scan                                        the bundled model
    confsteer scan openai-community/gpt2 --plot gpt2.png
    confsteer scan ./my-model --null-dims 12 --out my-model.scan
    """
    from confsteer.checkpoint import scan as run
    from confsteer.discovery.select import candidates

    result = run(model, **settings, progress=True)
    profile = result.profile
    folder = profile.save(out or Path(f"{Path(profile.model.id).name}.scan.confsteer"))
    tables.print_profile(tables.console(), profile)
    share = f", {result.bytes_read / result.bytes_total:.1%} of the checkpoint" if result.bytes_total else ""
    console = tables.console()
    console.print(f"Read: {escape(', '.join(result.tensors))}: {result.bytes_read / 1e6:,.1f} MB{share}.")
    if plot:
        from confsteer.report import plot_neurons

        plot_neurons(profile, plot)
        console.print(f"Drawn: {escape(str(plot))}")
    console.print(f"Profile of the weights written to {escape(str(folder))}")
    if not candidates(profile.weights):
        sys.exit(EXIT_NO_NEURONS)


@main.command()
@click.argument("profile")
@click.option(
    "--plot",
    type=OUTPUT_FILE,
    metavar="FILE.png",
    help="Draw norm against logit variance and null fraction against mediation (of a scan: against norm, and the spectrum).",
)
@click.option("--response", type=OUTPUT_FILE, metavar="FILE.png", help="Draw what the dials do.")
def show(profile: str, plot: Path | None, response: Path | None) -> None:
    """Print what PROFILE holds, or draw it."""
    loaded = Profile.load(profile)
    tables.print_profile(tables.console(), loaded)
    if plot or response:
        from confsteer.report import plot_neurons, plot_response

        for file, draw in ((plot, plot_neurons), (response, plot_response)):
            if file is not None:
                draw(loaded, file)
                tables.console().print(f"Drawn: {escape(str(file))}")


@main.command()
@click.argument("profile")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(profile: str, repo: str, private: bool) -> None:
    """Upload PROFILE to a hub repository, with a card."""
    from confsteer.hub import push as run

    click.echo(run(Profile.load(profile), repo, private=private))


@main.command()
@click.argument("prompt")
@_model_options
@_profile_option
@_steer_option
@click.option("--max-new-tokens", default=40, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--seed", default=0, show_default=True, help="The same for every steering.")
def generate(
    prompt: str,
    model: str | None,
    profile: str,
    steers: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    **loading: Any,
) -> None:
    """Continue PROMPT without steering and with each --steer.

    \b
    confsteer generate "It was a dark and" -p confsteer-demo -s entropy=-0.15 -s entropy=0.3
    """
    import torch

    from confsteer.hf import steer
    from confsteer.steering import Steering

    steerings = [Steering(), *map(Steering.parse, steers)]
    loaded = _load(model, loading)
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    table = Table("steering", "continuation", "entropy", show_lines=True)
    with steer(loaded.model, Profile.load(profile)) as steerer:
        for steering in steerings:
            steerer.update(steering)
            torch.manual_seed(seed)
            output = loaded.model.generate(
                **inputs,
                **sampling,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            )
            log_p = torch.stack(output.logits).float().log_softmax(-1)
            entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
            text = loaded.tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            table.add_row(str(steering), escape(text.strip()), f"{entropy:.2f}")
    tables.console().print(table, "Entropy: mean over the generated tokens, in nats.", sep="\n")


@main.command(name="eval")
@_model_options
@_profile_option
@_steer_option
@_text_options
@_window_option
@click.option("--tokens", type=click.IntRange(min=1), help="Read at most this many.  [default: all]")
@_json_option
@_plot_option
def evaluate(
    model: str | None,
    profile: str,
    steers: tuple[str, ...],
    text: _Text,
    window: int,
    tokens: int | None,
    as_json: Path | None,
    plot: Path | None,
    **loading: Any,
) -> None:
    """Compare loss, entropy and calibration without steering and with each --steer.

    \b
    confsteer eval -p confsteer-demo -s entropy=-0.15 -s entropy=0.3 --plot reliability.png
    confsteer eval ./my-model -p my-profile --text held-out.jsonl -s entropy=0.2 --json results.json
    confsteer eval ./my-chat-model -p my-profile --text chats.jsonl --chat -s entropy=0.2
    """
    from confsteer.evaluation.harness import evaluate as run
    from confsteer.steering import Steering

    steerings = [Steering.parse(steer) for steer in steers]
    loaded_profile = Profile.load(profile)
    given = text.documents(model, "held-out")
    if given is None:
        raise click.UsageError(f"{NO_TEXT} (on samples of its own every model is perfectly calibrated)")
    loaded = _load(model, loading)
    result = run(
        loaded.model,
        loaded.tokenizer,
        text.windows(*given, loaded.tokenizer, window, tokens),
        loaded_profile,
        steerings,
        progress=True,
    )
    console = tables.console()
    tables.print_evaluation(console, result)
    _write(console, result, as_json, plot, "plot_reliability")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", required=False, metavar="[MODEL]")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM OPTION]...")
@click.option("--profile", required=True, metavar="PROFILE", help="Folder, shipped name or hub repository.")
@click.option("--default", metavar="STEERING", help='Of requests that ask for none, such as "entropy=0.2".')
def serve(model: str | None, options: tuple[str, ...], profile: str, default: str | None) -> None:
    """Serve MODEL with vLLM; each request may carry a steering. Options that are not listed below go to vLLM.

    \b
    confsteer serve --profile confsteer-demo --max-model-len 512
    confsteer serve OWNER/MODEL --profile my-profile --port 8001 --tensor-parallel-size 2
    confsteer serve OWNER/MODEL --profile my-profile --default "entropy=0.2"

    \b
    Ask:  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "confsteer-demo",
            "prompt": "It was", "vllm_xargs": {"confsteer": "entropy=0.3"}}'
    See:  curl localhost:8000/confsteer
    """
    from confsteer.vllm.command import serve as run
    from confsteer.vllm.command import server_command

    words = [*filter(None, [model]), *options]
    named = bool(words) and not words[0].startswith("-")
    run(server_command(words[0] if named else None, profile, default, words[1:] if named else words))


@main.group()
def study() -> None:
    """Measurements of the paper (arXiv 2406.16254) on MODEL and the neurons of a profile.

    \b
    confsteer study induction -p confsteer-demo       entropy neurons when a text repeats itself
    confsteer study cumulative -p confsteer-demo      entropy neurons ablated together, against random ones
    """


@study.command()
@_model_options
@_profile_option
@_text_options
@click.option("--sequences", default=100, show_default=True, help="Of each kind; the paper has 1,000.")
@click.option("--half", default=100, show_default=True, help="Tokens of a stretch.")
@click.option("--seed", default=0, show_default=True, help="Of the random tokens.")
@_json_option
@_plot_option
def induction(
    model: str | None,
    profile: str,
    text: _Text,
    sequences: int,
    half: int,
    seed: int,
    as_json: Path | None,
    plot: Path | None,
    **loading: Any,
) -> None:
    """Entropy neurons when a stretch of tokens is read twice, random tokens and natural ones.

    Each neuron is clipped at its mean of the first reading, so that it cannot take part in what changes at the second. A
    MODEL without text gets random tokens only.

    \b
    confsteer study induction -p confsteer-demo --plot induction.png
    confsteer study induction openai-community/gpt2 -p my-profile --text book.txt --sequences 1000
    """
    from confsteer.corpus import leading_ids
    from confsteer.evaluation.induction import induction as run

    loaded_profile = Profile.load(profile)
    given = text.documents(model, "held-out")
    loaded = _load(model, loading)
    beginning = len(leading_ids(loaded.tokenizer))
    result = run(
        loaded.model,
        loaded.tokenizer,
        loaded_profile,
        texts=text.windows(*given, loaded.tokenizer, beginning + half, 2 * sequences * (beginning + half)) if given else None,
        sequences=sequences,
        half=half,
        seed=seed,
        progress=True,
    )
    console = tables.console()
    tables.print_induction(console, result)
    _write(console, result, as_json, plot, "plot_induction")


@study.command()
@_model_options
@_profile_option
@_text_options
@_window_option
@click.option("--tokens", default=5_120, show_default=True, type=click.IntRange(min=1), help="Read at most this many.")
@click.option("-k", type=int, help="Ablate at most this many neurons.  [default: all of the profile's]")
@click.option("--repeats", default=10, show_default=True, help="Draws of random neurons.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@_json_option
@_plot_option
def cumulative(
    model: str | None,
    profile: str,
    text: _Text,
    window: int,
    tokens: int,
    k: int | None,
    repeats: int,
    seed: int,
    as_json: Path | None,
    plot: Path | None,
    **loading: Any,
) -> None:
    """The 1, 2, ... k strongest entropy neurons set to their means, against random neurons of like norm.

    \b
    confsteer study cumulative -p confsteer-demo --plot cumulative.png
    confsteer study cumulative openai-community/gpt2 -p my-profile --text book.txt -k 6
    """
    from confsteer.evaluation.cumulative import cumulative as run

    loaded_profile = Profile.load(profile)
    given = text.documents(model, "held-out")
    if given is None:
        raise click.UsageError(NO_TEXT)
    loaded = _load(model, loading)
    result = run(
        loaded.model,
        loaded.tokenizer,
        text.windows(*given, loaded.tokenizer, window, tokens),
        loaded_profile,
        k=k,
        repeats=repeats,
        seed=seed,
        progress=True,
    )
    console = tables.console()
    tables.print_cumulative(console, result)
    _write(console, result, as_json, plot, "plot_cumulative")


def _write(console: Console, result: BaseModel, as_json: Path | None, plot: Path | None, draw: str) -> None:
    if as_json:
        as_json.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        console.print(f"Written: {escape(str(as_json))}")
    if plot:
        from confsteer import report

        getattr(report, draw)(result, plot)
        console.print(f"Drawn: {escape(str(plot))}")


def _load(model: str | None, loading: dict[str, Any]) -> Any:
    from confsteer.loading import load_model

    return load_model(model, **loading)
