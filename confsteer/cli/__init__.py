"""The command line. Each command calls one library function and prints what it returns.

options.py    options that commands share
find.py       count, calibrate, scan, show, push
steer.py      generate, bake, serve
export.py     export
play.py       play
measure.py    eval, report, lm-eval
tune.py       tune
study.py      study
"""

from __future__ import annotations

import errno
import warnings
from typing import Any

import click

from confsteer import bars
from confsteer.cli import export, find, measure, play, steer, study, tune
from confsteer.errors import ConfsteerError
from confsteer.report.printable import one_safe_line

EXTRAS = {
    **dict.fromkeys(("datasets", "jinja2", "matplotlib", "yaml"), "eval"),
    "gguf": "gguf",
    "lm_eval": "lm-eval",
    "relplot": "smooth-ece",
}
"""Packages that not everyone installs, and the extra that brings each."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a full or read-only disk, whether confsteer, a library or a redirected output was writing."""


class _Group(click.Group):
    """Group whose commands turn confsteer's errors into a sentence and exit code 1, warnings into a line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Keep the commands in the order of work, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: bars.note(f"Warning: {one_safe_line(str(message))}")
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
        finally:
            bars.stop()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="confsteer")
def main() -> None:
    """Confidence control for language models, with their own neurons.

    MODEL is a hub id, a folder or a GGUF file. Without it the bundled demonstration model is used. PROFILE is a folder, the
    name of a shipped profile (confsteer-demo) or a hub repository.

    Exit codes: 0 done, 1 a clear error, 2 wrong usage, 3 the model has no such neurons, 4 tuning gained nothing, 130 an
    evaluation was interrupted. Complete results are kept then.
    """


# List commands in the order of work: --help has the same order.
for command in (
    find.calibrate,
    find.scan,
    find.count,
    find.show,
    find.push,
    steer.generate,
    play.play,
    measure.evaluate,
    measure.report,
    tune.tune,
    measure.lm_eval_tasks,
    steer.bake,
    export.export,
    steer.serve,
    study.study,
):
    main.add_command(command)
