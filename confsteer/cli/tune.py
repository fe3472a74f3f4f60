"""The command that chooses a steering by data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

import confsteer
from confsteer.cli.options import (
    EXIT_NOTHING_GAINED,
    NO_TEXT,
    TextOptions,
    json_option,
    load,
    model_options,
    profile_option,
    report_option,
    text_options,
    window_option,
    write_html,
    write_json,
)
from confsteer.report import tables
from confsteer.steering import Steering


@click.command()
@model_options
@profile_option
@text_options
@window_option
@click.option(
    "--tokens", default=40_000, show_default=True, type=click.IntRange(min=1), help="Read at most this many of each text."
)
@click.option("--dials", is_flag=True, help="Tune the two dials only, not each neuron.")
@click.option("--temperature", is_flag=True, help="Fit a temperature beside them, for you to sample with.")
@click.option(
    "--objective",
    type=click.Choice(["nll", "brier", "ece"]),
    default="nll",
    show_default=True,
    help="What to minimise: the loss, the Brier score of the top prediction, or its calibration error.",
)
@click.option(
    "--ridge",
    default=2e-5,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Pull towards neutral: part of the unsteered objective that a gain one off costs.",
)
@click.option(
    "--leave-one-out/--no-leave-one-out", default=True, help="Of several texts: tune on all but one too.  [default: on]"
)
@click.option("--seed", default=0, show_default=True, help="Of the order in which documents are shared out.")
@click.option("--name", default="calibrated", show_default=True, metavar="PRESET", help="What to call what is found.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write the profile with the preset to.  [default: PROFILE]",
)
@json_option
@report_option
def tune(
    model: str | None,
    profile: str,
    text: TextOptions,
    window: int,
    tokens: int,
    dials: bool,
    temperature: bool,
    name: str,
    out: Path | None,
    as_json: Path | None,
    report: Path | None,
    **settings: Any,
) -> None:
    """Find the steering that makes text like yours likeliest or best calibrated, and keep it as a preset of PROFILE.

    \b
    confsteer tune OWNER/MODEL -p my-profile --text wiki.txt --text code.txt --text chat.txt --report tuned.html
    confsteer tune OWNER/MODEL -p my-profile --dataset OWNER/TEXTS --objective ece --name cautious

    Give every kind of text the model will see, each as a --text of its own: they count equally, and what is tuned on one kind
    can do harm on another. Each is cut in four, by documents: what is tuned on, what says when to stop, what says whether
    anything was gained, and what the tables are of. What does not beat the unsteered model on the third beyond its interval is
    not saved: exit code 4.

    \b
    Afterwards:  confsteer eval ... -s preset=calibrated    confsteer serve ... --default preset=calibrated
    """
    from confsteer.text.sources import by_title

    Steering.parse({"preset": name})
    if report:
        from confsteer.report.page import write_report  # noqa: F401  what it needs is missed now, not after the work
    sources = by_title(text.sources(model, "calibration"))
    if not sources:
        raise click.UsageError(NO_TEXT)
    loaded_profile = confsteer.Profile.load(profile)
    folder = out or Path(profile)
    if out is None and not folder.is_dir():
        raise click.UsageError(
            f"{profile} is not a folder on this machine: say with --out where to write the profile with the preset"
        )
    if not os.access(next(place for place in (folder, *folder.absolute().parents) if place.exists()), os.W_OK):
        raise click.UsageError(f"{folder} cannot be written to: say with --out where to write the profile with its preset")
    loaded = load(model, {key: settings.pop(key) for key in ("device", "dtype", "revision", "trust_remote_code")})
    result = confsteer.tune(
        loaded.model,
        loaded.tokenizer,
        {title: source.windows(loaded.tokenizer, window, tokens) for title, source in sources.items()},
        loaded_profile,
        parameters="dials" if dials else "neurons",
        with_temperature=temperature,
        progress=True,
        **settings,
    )
    console = tables.console()
    tables.print_tuning(console, result)
    if result.gained:
        loaded_profile.with_preset(name, result.steering).save(folder)
        console.print(f"Preset {tables.escape(name)} written to {tables.escape(str(folder))}")
        if result.temperature is not None:
            console.print(f"It was tuned for sampling at temperature {result.temperature:.3f}, which a preset cannot hold.")
    else:
        console.print("[bold]Nothing saved:[/bold] on the validation split it does not beat neutral beyond the interval.")
    write_json(console, result, as_json)
    write_html(console, result, report, loaded_profile)
    if not result.gained:
        sys.exit(EXIT_NOTHING_GAINED)
