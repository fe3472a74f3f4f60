"""Commands that find neurons, show them and pass them on: count, calibrate, scan, show, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import confsteer
from confsteer import bars, defaults
from confsteer.cli.options import (
    EXIT_NO_NEURONS,
    NO_TEXT,
    OUTPUT_FILE,
    PICTURE_FILE,
    PROFILE,
    TEXT_FILE,
    ModelOptions,
    TextOptions,
    WindowedTextOptions,
    corpus_options,
    gguf_option,
    model_options,
    revision_option,
    trust_option,
    wide_option,
    windowed_text_options,
    write_picture,
)
from confsteer.errors import ProfileError
from confsteer.report import tables
from confsteer.report.printable import one_safe_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

null_dims_option = click.option(
    "--null-dims", type=click.IntRange(min=1), help="Size of the unembedding's null space.  [default: from its spectrum]"
)


@click.command(short_help="Find the neurons, measure what they do, save a profile.")
@model_options
@windowed_text_options(defaults.CALIBRATION_TOKENS, "Read at most this many of each text.")
@click.option(
    "--unigram",
    type=TEXT_FILE,
    metavar="FILE.npy",
    help="Token counts by id of text like the model's training text.  [default: counted in the text]",
)
@null_dims_option
@click.option(
    "--null-direction",
    is_flag=True,
    help="Make the entropy dial by hand: a constant before the final norm, where the unembedding reads least; no neurons.",
)
@click.option(
    "--scan",
    "scanned",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Take the statistics of the weights from a scan of MODEL.",
)
@click.option(
    "--seed", default=defaults.SEED, show_default=True, help="Of the random directions behind the chance levels, and of sampling."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the profile.  [default: NAME.confsteer]")
@click.option("--resume", is_flag=True, help="Go on where an interrupted calibration of the same settings stopped.")
def calibrate(
    chosen: ModelOptions,
    text: WindowedTextOptions,
    unigram: Path | None,
    scanned: Path | None,
    out: Path | None,
    resume: bool,
    **settings: Any,
) -> None:
    """Find MODEL's entropy and token-frequency neurons and save a profile.

    \b
    confsteer calibrate             the bundled model on the Python documentation
    confsteer calibrate MODEL       a model on text that it is made to write
    confsteer calibrate MODEL --text wiki.txt --text code-folder --text chat.jsonl
    confsteer calibrate MODEL --text corpus.jsonl.gz --field content
    confsteer calibrate MODEL --dataset HUB_ID --split validation
    confsteer calibrate MODEL --text chats.jsonl --chat --unigram counts.npy

    \b
    A line of chats.jsonl: {"messages": [{"role": "user", "content": "Hi"}, ...]}
    An image in it:        "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}]

    Each --text is a text of its own, and they count equally. A dial's number is its mean change over them, and the profile
    also has its spread over the texts. Give every kind of text that the model will see.

    Tokens are ranked by how often they occur in the text. But 25,600 tokens are too few to rank a vocabulary, and a warning
    says so. --unigram takes counts from text like the model's training text: confsteer count makes them.

    --null-direction makes an entropy dial by hand: a constant in the residual that acts as entropy neurons do. It is for
    models without entropy neurons, or whose neurons the engine does not reach. It has no neurons to scale or clamp. It runs
    in transformers, in vLLM, baked, and as a control vector in llama.cpp (Gemma too).

    A run in a single process saves its sums in the folder every minute. After an interruption, the same command with --resume
    goes on from there, and ends with the same profile.
    """
    from confsteer.calibration.progress import FILE_NAME
    from confsteer.distributed import init_distributed
    from confsteer.profile.schema import model_id
    from confsteer.text.sources import by_title

    # Let the first of several processes speak and save for all: they share the work.
    process = init_distributed()
    first = process.rank == 0
    sources = by_title(text.sources(chosen.model, "calibration"))
    counts = _unigram_counts(unigram, chosen.model)
    loaded = chosen.load()
    if not sources and first:
        click.echo(
            f"No text given: the model writes its own, {text.tokens:,} tokens sampled at temperature 1 (seed {settings['seed']})."
        )
    folder = out or Path(f"{_folder_name(model_id(loaded.model.config))}.confsteer")
    checkpoint = folder / FILE_NAME
    _say_where_it_begins(checkpoint, resume)

    try:
        profile = confsteer.calibrate(
            loaded.model,
            loaded.tokenizer,
            {title: text.windows(source, loaded) for title, source in sources.items()} or None,
            tokens=text.tokens,
            window=text.window,
            unigram_counts=counts,
            scanned=confsteer.Profile.load(scanned) if scanned else None,
            progress=first,
            checkpoint=checkpoint if process.world_size == 1 else None,
            resume=resume,
            **settings,
        )
        if not first:
            return
        profile.save(folder)
    except (KeyboardInterrupt, ProfileError):
        bars.stop()
        if checkpoint.exists():
            click.echo(f"What was measured is kept: the same command with --resume goes on from {checkpoint}.", err=True)
        raise
    checkpoint.unlink(missing_ok=True)

    tables.print_profile(tables.console(), profile)
    tables.console().print(f"Profile written to {tables.escape(str(folder))}")
    if not (profile.entropy_neurons or profile.frequency_neurons or profile.null_direction):
        sys.exit(EXIT_NO_NEURONS)


@click.command(short_help="Count the tokens of a corpus, for calibrate --unigram.")
@click.argument("model", required=False)
@gguf_option
@revision_option
@trust_option
@corpus_options
@click.option("--out", required=True, type=OUTPUT_FILE, metavar="FILE.npy", help="Of the counts.")
def count(
    model: str | None, gguf_file: str | None, revision: str | None, trust_remote_code: bool, text: TextOptions, out: Path
) -> None:
    """Count how often each token of MODEL's tokenizer occurs in a corpus of any size. Only the tokenizer is loaded.

    \b
    confsteer count OWNER/MODEL --text corpus.jsonl.gz --text folder --out counts.npy
    confsteer count model.gguf --dataset HUB_ID --field content --out counts.npy
    confsteer calibrate OWNER/MODEL --text book.txt --unigram counts.npy

    Token-frequency neurons are found by the token frequencies of the model's training text. A text as long as calibration's
    ranks only the commonest tokens. Ten million tokens of text like the training text are enough.
    """
    import io

    import numpy as np
    import torch

    from confsteer.files import write_result
    from confsteer.model import gguf
    from confsteer.model.loading import load_tokenizer, source_of
    from confsteer.text.counts import count_tokens, counts_sha256

    source = text.source(model, "calibration")
    if source is None:
        raise click.UsageError(NO_TEXT)
    place = source_of(model, gguf_file)
    file = gguf.find(place, gguf_file, revision)
    tokenizer = load_tokenizer(place, file=file, revision=revision, trust_remote_code=trust_remote_code)
    counts = count_tokens(source.documents(in_parts=True), tokenizer, progress=True)
    content = io.BytesIO()
    np.save(content, counts)
    write_result(out, content.getvalue())
    click.echo(
        f"{one_safe_line(source.title)}: {counts.sum():,} tokens. {np.count_nonzero(counts):,} of the tokenizer's "
        f"{len(counts):,} occur; the median token occurs {np.median(counts):,.0f} times."
    )
    click.echo(f"SHA-256, as a profile holds it: {counts_sha256(torch.from_numpy(counts))}")
    click.echo(f"Written: {one_safe_line(str(out))}")


def _unigram_counts(file: Path | None, model: str | None) -> NDArray[np.integer] | None:
    """Read token counts. The bundled model comes with those of its training text."""
    from confsteer.model.loading import DEMO_UNIGRAM
    from confsteer.text.counts import read_counts

    if file is None and model is None:
        file = DEMO_UNIGRAM
    return None if file is None else read_counts(file)


def _say_where_it_begins(checkpoint: Path, resume: bool) -> None:
    """Warn of a checkpoint that is missing, or that is there but not used."""
    if resume and not checkpoint.exists():
        click.echo(f"There is no {checkpoint}: from the beginning.")
    if not resume and checkpoint.exists():
        click.echo(f"{checkpoint} is of an interrupted calibration, which --resume would go on from: starting anew.")


@click.command(short_help="Find candidates in the weights on disk: no text, no model loaded.")
@click.argument("model", required=False)
@gguf_option
@revision_option
@trust_option
@null_dims_option
@click.option("--seed", default=defaults.SEED, show_default=True, help="Of the random directions behind the chance level.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the profile.  [default: NAME.scan.confsteer]"
)
@click.option(
    "--plot",
    type=PICTURE_FILE,
    metavar="FILE.png",
    help="Draw norm, logit variance, null fraction and the spectrum.",
)
@click.option(
    "--published",
    "name",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Compare with neurons that others have published of MODEL, or of the model NAME that it is made of.",
)
def scan(model: str | None, out: Path | None, plot: Path | None, name: str | None, **settings: Any) -> None:
    """Look for entropy neurons in MODEL's weights alone, and save a profile of the weights.

    It reads three weights of a safetensors checkpoint or a GGUF file, a few percent of its bytes. It loads no model and needs
    no text. It finds candidates; confsteer calibrate measures their effects.

    \b
    confsteer scan                                        the bundled model
    confsteer scan openai-community/gpt2 --plot gpt2.png
    confsteer scan ./my-model --null-dims 12 --out my-model.scan
    confsteer scan my-model.Q4_K_M.gguf
    confsteer scan openai-community/gpt2 --published
    confsteer scan qwen2.5-coder.gguf --published Qwen/Qwen2.5-0.5B
    """
    from confsteer.calibration.published import published
    from confsteer.discovery.select import candidates
    from confsteer.model.loading import DEMO_NAME

    known = None if name is None else published(name or model or DEMO_NAME)
    result = confsteer.scan(model, **settings, progress=True)
    profile = result.profile
    folder = profile.save(out or Path(f"{_folder_name(profile.model.id)}.scan.confsteer"))
    tables.print_profile(tables.console(), profile)
    share = f", {result.bytes_read / result.bytes_total:.1%} of the checkpoint" if result.bytes_total else ""
    console = tables.console()
    console.print(f"Read: {tables.escape(', '.join(result.tensors))}: {result.bytes_read / 1e6:,.1f} MB{share}.")
    if known:
        tables.print_agreement(console, profile, known)
    if plot:
        from confsteer.report.plots import plot_neurons

        write_picture(console, plot_neurons(profile), plot)
    console.print(f"Profile of the weights written to {tables.escape(str(folder))}")
    if not candidates(profile.weights):
        sys.exit(EXIT_NO_NEURONS)


@click.command(short_help="Print what a profile holds, as tables or pictures.")
@click.argument("profile", type=PROFILE)
@click.option(
    "--plot",
    type=PICTURE_FILE,
    metavar="FILE.png",
    help="Draw norm against logit variance and null fraction against mediation (of a scan: against norm, and the spectrum).",
)
@click.option("--response", type=PICTURE_FILE, metavar="FILE.png", help="Draw what the dials do.")
@click.option("--near", is_flag=True, help="List the neurons that lack one thing only to be reported, and what they lack.")
@wide_option
def show(profile: str, plot: Path | None, response: Path | None, near: bool, wide: bool) -> None:
    """Print PROFILE's contents, or draw them."""
    loaded, console = confsteer.Profile.load(profile), tables.console(wide=wide)
    tables.print_profile(console, loaded)
    if near:
        tables.print_near_misses(console, loaded)
    if plot or response:
        from confsteer.report.plots import plot_neurons, plot_response

        for file, draw in ((plot, plot_neurons), (response, plot_response)):
            if file is not None:
                write_picture(tables.console(), draw(loaded), file)


@click.command(short_help="Upload a profile to a hub repository, with a card.")
@click.argument("profile", type=PROFILE)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(profile: str, repo: str, private: bool) -> None:
    """Upload PROFILE to a hub repository, with a card."""
    from confsteer.profile import hub

    click.echo(hub.push(confsteer.Profile.load(profile), repo, private=private))


def _folder_name(model: str) -> str:
    """Name a folder after a model."""
    return Path(model).resolve().name or "model"
