"""The paper's measurements: study induction, study cumulative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import confsteer
from confsteer.cli.options import (
    NO_TEXT,
    TextOptions,
    json_option,
    load,
    model_options,
    plot_option,
    profile_option,
    text_options,
    window_option,
    write,
)
from confsteer.report import tables


@click.group()
def study() -> None:
    """Measurements of the paper (arXiv 2406.16254) on MODEL and the neurons of a profile.

    \b
    confsteer study induction -p confsteer-demo       entropy neurons when a text repeats itself
    confsteer study cumulative -p confsteer-demo      entropy neurons ablated together, against random ones
    """


@study.command()
@model_options
@profile_option
@text_options
@click.option("--sequences", default=100, show_default=True, help="Of each kind; the paper has 1,000.")
@click.option("--half", default=100, show_default=True, help="Tokens of a stretch.")
@click.option("--seed", default=0, show_default=True, help="Of the random tokens.")
@json_option
@plot_option
def induction(
    model: str | None,
    profile: str,
    text: TextOptions,
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
    from confsteer.studies.induction import induction as run
    from confsteer.text.windows import leading_ids

    loaded_profile = confsteer.Profile.load(profile)
    source = text.source(model, "held-out")
    loaded = load(model, loading)
    beginning = len(leading_ids(loaded.tokenizer))
    result = run(
        loaded.model,
        loaded.tokenizer,
        loaded_profile,
        texts=source.windows(loaded.tokenizer, beginning + half, 2 * sequences * (beginning + half)) if source else None,
        sequences=sequences,
        half=half,
        seed=seed,
        progress=True,
    )
    console = tables.console()
    tables.print_induction(console, result)
    write(console, result, as_json, plot, "plot_induction")


@study.command()
@model_options
@profile_option
@text_options
@window_option
@click.option("--tokens", default=5_120, show_default=True, type=click.IntRange(min=1), help="Read at most this many.")
@click.option("-k", type=int, help="Ablate at most this many neurons.  [default: all of the profile's]")
@click.option("--repeats", default=10, show_default=True, help="Draws of random neurons.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@json_option
@plot_option
def cumulative(
    model: str | None,
    profile: str,
    text: TextOptions,
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
    from confsteer.studies.cumulative import cumulative as run

    loaded_profile = confsteer.Profile.load(profile)
    source = text.source(model, "held-out")
    if source is None:
        raise click.UsageError(NO_TEXT)
    loaded = load(model, loading)
    result = run(
        loaded.model,
        loaded.tokenizer,
        source.windows(loaded.tokenizer, window, tokens),
        loaded_profile,
        k=k,
        repeats=repeats,
        seed=seed,
        progress=True,
    )
    console = tables.console()
    tables.print_cumulative(console, result)
    write(console, result, as_json, plot, "plot_cumulative")
