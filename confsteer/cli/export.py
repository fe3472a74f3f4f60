"""The command that writes a steering for engines that know nothing of confsteer: export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

import confsteer
from confsteer import defaults
from confsteer.cli.options import (
    OUTPUT_FILE,
    ModelOptions,
    WindowedTextOptions,
    model_options,
    profile_option,
    steer_option,
    windowed_text_options,
)
from confsteer.report import tables
from confsteer.report.printable import one_safe_line

if TYPE_CHECKING:
    from rich.console import Console

    from confsteer.model.checkpoint import LastLayer
    from confsteer.profile.profile import Profile
    from confsteer.runtimes.llamacpp.after_norm import DialAfterNorm
    from confsteer.steering import Steering

KINDS = ("control-vector", "lora")


@click.command(short_help="Write a steering as files that stock llama.cpp reads.")
@model_options
@profile_option
@steer_option
@click.option(
    "--to",
    "targets",
    type=(click.Choice(KINDS), OUTPUT_FILE),
    multiple=True,
    required=True,
    metavar="KIND FILE.gguf",
    help="control-vector, for what adds a constant; lora, for what multiplies activations. Both, for a steering that does both.",
)
@windowed_text_options(
    defaults.AFTER_NORM_TOKENS, "Read at most this many, to measure the entropy dial of a model with a norm on the MLP's output."
)
@click.option("--ladder", "rungs", metavar="DIAL=LOW:HIGH:STEPS", help="Write a control vector for each of several settings.")
@click.option(
    "--scale-per-nat", is_flag=True, help="Write one dial so that FILE:0.3 means +0.3 nats, nearly, and say how nearly."
)
def export(
    chosen: ModelOptions,
    profile: str,
    steers: tuple[str, ...],
    targets: tuple[tuple[str, Path], ...],
    text: WindowedTextOptions,
    rungs: str | None,
    scale_per_nat: bool,
) -> None:
    """Write a steering of MODEL as files for llama-server and llama-cli, which run it without confsteer.

    \b
    confsteer export model.gguf -p my-profile -s entropy=0.3 --to control-vector calm.gguf
    confsteer export model.gguf -p my-profile -s "scale.entropy=0.5" --to lora gains.gguf --to control-vector constant.gguf
    confsteer export model.gguf -p my-profile --ladder entropy=-0.3:1:8 --to control-vector calm.gguf
    confsteer export model.gguf -p my-profile -s entropy=0.3 --scale-per-nat --to control-vector dial.gguf

    Dials and shifts add a constant to the last layer's output, which is a control vector of that layer. A scale multiplies a
    neuron's deviation from its mean: that is a LoRA, and a constant too. Only three weights of MODEL are read.

    Ranges (clamp.N=LOW:HIGH), and positions other than all, are refused. Some models have a norm on the MLP's output (Gemma 2
    and 3, OLMo 2). A constant before the norm is not a constant after it, so it is refused. But with --text the entropy dial
    is measured after the norm, as a dial of its own:

    \b
    confsteer export gemma.gguf -p my-profile -s entropy=0.3 --text wiki.txt --to control-vector calm.gguf
    """
    from confsteer.model.checkpoint import read_last_layer
    from confsteer.model.loading import source_of
    from confsteer.runtimes.llamacpp.adapters import export as write
    from confsteer.runtimes.llamacpp.ladder import ladder
    from confsteer.steering import Steering

    files = dict(targets)
    if len(files) != len(targets):
        raise click.UsageError("give --to once for each of control-vector and lora")
    if len(steers) > 1 or not (steers or rungs):
        raise click.UsageError('give --steer once, such as "entropy=0.1 scale.767=0", or --ladder')
    if rungs and (scale_per_nat or "control-vector" not in files):
        raise click.UsageError(
            "--ladder goes with --to control-vector, and without --scale-per-nat, which needs one file for all"
        )
    measured = bool(text.texts or text.dataset)
    if measured and scale_per_nat:
        raise click.UsageError(
            "--scale-per-nat reads the profile's curve, and the dial after the norm has another: leave out one"
        )
    loaded = confsteer.Profile.load(profile)
    steering = loaded.resolve(Steering.parse(steers[0]) if steers else Steering())
    settings = ladder(rungs, steering) if rungs else {"": steering}

    last = read_last_layer(
        source_of(chosen.model, chosen.gguf_file),
        gguf_file=chosen.gguf_file,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
    )
    after_norm = _measure(chosen, loaded, last, text) if measured else None
    vector, console = files.get("control-vector"), tables.console()
    for suffix, setting in settings.items():
        own = vector.with_name(f"{vector.stem}.{suffix}{vector.suffix}") if vector and suffix else vector
        written = write(
            setting,
            loaded,
            last,
            control_vector=own,
            lora=files.get("lora"),
            scale_per_nat=scale_per_nat,
            after_norm=after_norm,
        )
        for file in filter(None, (own, files.get("lora"))):
            click.echo(f"Written: {file}, {setting} of layer {written.parts.layer}.")
        if written.halves:
            click.echo("  Measured as a constant after the norm: {:+.3f} and {:+.3f} nats on the halves.".format(*written.halves))
        named = last.file.path if last.file else "MODEL.gguf"
        click.echo(f"  llama-server -m {shlex.quote(str(named))} {written.options}")
    if scale_per_nat:
        _print_readings(console, loaded, steering)


def _measure(chosen: ModelOptions, profile: Profile, last: LastLayer, text: WindowedTextOptions) -> DialAfterNorm:
    """Load the model and measure its entropy dial after the norm."""
    from confsteer.runtimes.llamacpp.after_norm import dial_after_norm

    if last.anatomy.write_norm is None:
        raise click.UsageError("--text is for models with a norm on the MLP's output: here the control vector is the dial itself")
    source = text.source(chosen.model, "held-out")
    assert source is not None
    loaded = chosen.load()
    found = dial_after_norm(loaded.model, text.windows(source, loaded), profile)
    click.echo(f"Measured the entropy dial after the norm on {found.tokens:,} tokens of {one_safe_line(found.source)}.")
    return found


def _print_readings(console: Console, profile: Profile, steering: Steering) -> None:
    """Print the effect of scales that are read as nats."""
    from confsteer.runtimes.llamacpp.per_nat import readings, the_dial

    dial = the_dial(steering)
    table = Table(f"scale, read as nats of {dial}", "by the profile's curve", "error")
    for scale, change in readings(profile, dial):
        known = ["beyond it", ""] if change is None else [f"{change:+.3f}", f"{change - scale:+.3f}"]
        table.add_row(f"{scale:+.3f}", *known)
    console.print(table)
