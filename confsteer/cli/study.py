"""Commands that repeat the paper's measurements: study induction, study cumulative."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import confsteer
from confsteer import defaults
from confsteer.cli.options import (
    NO_TEXT,
    ModelOptions,
    OutputOptions,
    TextOptions,
    WindowedTextOptions,
    json_and_plot_options,
    model_options,
    profile_option,
    text_options,
    windowed_text_options,
)
from confsteer.report import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from confsteer.studies.cumulative import CumulativeStudy
    from confsteer.studies.induction import InductionStudy


@click.group(short_help="Repeat the paper's measurements: induction, cumulative ablation.")
def study() -> None:
    """Repeat the paper's measurements (arXiv 2406.16254) on MODEL and the neurons of a profile.

    \b
    confsteer study induction -p confsteer-demo       entropy neurons when a text repeats itself
    confsteer study cumulative -p confsteer-demo      entropy neurons ablated together, against random ones
    """


@study.command(name="induction")
@model_options
@profile_option
@text_options
@click.option("--sequences", default=defaults.INDUCTION_SEQUENCES, show_default=True, help="Of each kind; the paper has 1,000.")
@click.option("--half", default=defaults.INDUCTION_HALF, show_default=True, help="Tokens of a stretch.")
@click.option("--seed", default=defaults.SEED, show_default=True, help="Of the random tokens.")
@json_and_plot_options
def study_induction(
    chosen: ModelOptions, profile: str, text: TextOptions, sequences: int, half: int, seed: int, output: OutputOptions
) -> None:
    """Measure entropy neurons when a stretch of tokens is read twice, with random and with natural tokens.

    Each neuron is clipped at its mean of the first reading, so that it cannot take part in the change at the second. Without
    a text there are only random tokens.

    \b
    confsteer study induction -p confsteer-demo --plot induction.png
    confsteer study induction openai-community/gpt2 -p my-profile --text book.txt --sequences 1000
    """
    from confsteer.studies.induction import induction
    from confsteer.studies.repetition import Repetition, natural_cut

    loaded_profile = confsteer.Profile.load(profile)
    source = text.source(chosen.model, "held-out")
    model, tokenizer = chosen.load()
    repeat = Repetition(sequences, half, seed)
    windows = source.windows(tokenizer, *natural_cut(tokenizer, repeat)) if source else None
    result = induction(model, tokenizer, loaded_profile, text=windows, repeat=repeat, progress=True)
    console = tables.console()
    tables.print_induction(console, result)
    output.write(console, result, _draw_induction)


def _draw_induction(result: InductionStudy) -> Figure:
    from confsteer.report.plots import plot_induction

    return plot_induction(result)


@study.command(name="cumulative")
@model_options
@profile_option
@windowed_text_options(defaults.CUMULATIVE_TOKENS)
@click.option("-k", type=int, help="Ablate at most this many neurons.  [default: all of the profile's]")
@click.option("--repeats", default=defaults.CUMULATIVE_REPEATS, show_default=True, help="Draws of random neurons.")
@click.option("--seed", default=defaults.SEED, show_default=True, help="Of the draws.")
@json_and_plot_options
def study_cumulative(
    chosen: ModelOptions,
    profile: str,
    text: WindowedTextOptions,
    k: int | None,
    repeats: int,
    seed: int,
    output: OutputOptions,
) -> None:
    """Set the 1, 2, ... k strongest entropy neurons to their means, against random neurons of similar norm.

    \b
    confsteer study cumulative -p confsteer-demo --plot cumulative.png
    confsteer study cumulative openai-community/gpt2 -p my-profile --text book.txt -k 6
    """
    from confsteer.studies.cumulative import cumulative

    loaded_profile = confsteer.Profile.load(profile)
    source = text.source(chosen.model, "held-out")
    if source is None:
        raise click.UsageError(NO_TEXT)
    loaded = chosen.load()
    windows = text.windows(source, loaded)
    result = cumulative(loaded.model, windows, loaded_profile, k=k, repeats=repeats, seed=seed, progress=True)
    console = tables.console()
    tables.print_cumulative(console, result)
    output.write(console, result, _draw_cumulative)


def _draw_cumulative(result: CumulativeStudy) -> Figure:
    from confsteer.report.plots import plot_cumulative

    return plot_cumulative(result)
