"""The command line. Each command calls one library function and prints what it returns."""

from __future__ import annotations

import errno
import warnings
from typing import Any

import click

from confsteer.cli import find, measure, steer, study, tune
from confsteer.errors import ConfsteerError
from confsteer.report.printable import one_safe_line

EXTRAS = {
    **dict.fromkeys(("datasets", "jinja2", "matplotlib", "yaml"), "eval"),
    "lm_eval": "lm-eval",
    "relplot": "smooth-ece",
}
"""Packages that not everyone installs, and the extra they come with."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk says that does not take more, whoever was writing: confsteer, a library, or a redirected output."""


class _Group(click.Group):
    """Errors that confsteer raises on purpose become a sentence and exit code 1, warnings a line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {one_safe_line(str(message))}", err=True)
                return super().invoke(ctx)
        except ConfsteerError as error:
            raise click.ClickException("\n".join(map(one_safe_line, str(error).splitlines()))) from error
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise click.ClickException(
                f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}"
            ) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            raise click.ClickException(f"this needs {package}: pip install 'confsteer[{EXTRAS[package]}]'") from error


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
    confsteer report RESULTS.json      an evaluation or a tuning as one HTML file
    confsteer tune MODEL -p PROFILE --text ...   the steering that suits your text, kept as a preset of the profile
    confsteer lm-eval --tasks ...      lm-eval's tasks on a steered model, and the calibration of its answers
    confsteer bake MODEL -p PROFILE -s STEERING --out FOLDER   a checkpoint with a steering in its weights, for any engine
    confsteer serve MODEL --profile PROFILE   a vLLM server whose requests choose their steering
    confsteer study ... -p PROFILE     measurements of the paper: induction, cumulative ablation

    MODEL is a hub id or a folder; without it the bundled demonstration model is used. PROFILE is a folder, the name of a
    shipped profile (confsteer-demo) or a hub repository.

    Exit codes: 0 done, 1 a clear error, 2 wrong usage, 3 the model has no such neurons, 4 tuning gained
    nothing.
    """


for command in (
    find.calibrate,
    find.scan,
    find.show,
    find.push,
    steer.generate,
    steer.bake,
    steer.serve,
    measure.evaluate,
    measure.report,
    tune.tune,
    measure.lm_eval_tasks,
    study.study,
):
    main.add_command(command)
