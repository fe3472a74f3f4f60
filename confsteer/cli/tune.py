"""The command that tunes a steering on data: tune."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

import confsteer
from confsteer import defaults
from confsteer.cli.options import (
    EXIT_NOTHING_GAINED,
    NO_TEXT,
    ModelOptions,
    OutputOptions,
    QuestionOptions,
    WindowedTextOptions,
    grouped,
    model_options,
    profile_option,
    question_options,
    tuning_output_options,
    windowed_text_options,
)
from confsteer.report import tables
from confsteer.report.answer_tables import print_answer_tuning
from confsteer.steering import Steering

if TYPE_CHECKING:
    from confsteer.model.loading import LoadedModel
    from confsteer.profile.profile import Profile
    from confsteer.tuning.tune import Tuning, TuningSettings
    from confsteer.tuning.tune_answers import AnswerTuning

Work = Callable[["LoadedModel", "Profile"], "Tuning | AnswerTuning"]


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """Parameters to tune, and how."""

    dials: bool
    temperature: bool
    objective: Literal["nll", "brier", "ece"]
    ridge: float
    leave_one_out: bool
    seed: int

    def settings(self) -> TuningSettings:
        """Turn the options into keywords of `confsteer.tune`, with progress bars."""
        return {
            "parameters": "dials" if self.dials else "neurons",
            "with_temperature": self.temperature,
            "objective": self.objective,
            "ridge": self.ridge,
            "leave_one_out": self.leave_one_out,
            "seed": self.seed,
            "progress": True,
        }


tuning_options = grouped(
    "how",
    TuningOptions,
    click.option("--dials", is_flag=True, help="Tune the two dials only, not each neuron."),
    click.option("--temperature", is_flag=True, help="Fit a temperature beside them, for you to sample with."),
    click.option(
        "--objective",
        type=click.Choice(["nll", "brier", "ece"]),
        default=defaults.OBJECTIVE,
        show_default=True,
        help="What to minimise: the loss, the Brier score of the top prediction, or its calibration error.",
    ),
    click.option(
        "--ridge",
        default=defaults.RIDGE,
        show_default=True,
        type=click.FloatRange(min=0),
        help="Pull towards neutral: part of the unsteered objective that a gain one off costs.",
    ),
    click.option(
        "--leave-one-out/--no-leave-one-out", default=True, help="Of several texts: tune on all but one too.  [default: on]"
    ),
    click.option("--seed", default=defaults.SEED, show_default=True, help="Of the order in which documents are shared out."),
)


@click.command(short_help="Find the steering that suits your text and keep it as a preset.")
@model_options
@profile_option
@windowed_text_options(defaults.TUNING_TOKENS, "Read at most this many of each text.")
@question_options
@tuning_options
@click.option("--name", default="calibrated", show_default=True, metavar="PRESET", help="What to call what is found.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write the profile with the preset to.  [default: PROFILE]",
)
@tuning_output_options
def tune(
    chosen: ModelOptions,
    profile: str,
    text: WindowedTextOptions,
    asked: QuestionOptions,
    how: TuningOptions,
    name: str,
    out: Path | None,
    output: OutputOptions,
) -> None:
    """Find the steering that makes text like yours likeliest or best calibrated, and keep it as a preset of PROFILE.

    \b
    confsteer tune OWNER/MODEL -p my-profile --text wiki.txt --text code.txt --text chat.txt --report tuned.html
    confsteer tune OWNER/MODEL -p my-profile --dataset OWNER/TEXTS --objective ece --name cautious
    confsteer tune OWNER/MODEL -p my-profile --choices questions.jsonl --format letters --chat

    Give every kind of text that the model will see, each as a --text of its own. They count equally. A steering tuned on one
    kind can do harm on another. Each text is cut by documents into four parts: to tune on, to stop by, to validate, and to
    report on. A steering that does not beat the unsteered model on the third part by more than the interval is not saved:
    exit code 4.

    With --choices the steering is tuned for the loss of answers, together with a temperature on whole choices. It has to beat
    that temperature fitted alone. confsteer eval --help says how questions are asked.

    \b
    Afterwards:  confsteer eval ... -s preset=calibrated    confsteer serve ... --default preset=calibrated
    """
    from confsteer.tuning.tune import Tuning

    # Refuse now a name or a folder that would fail after the work.
    Steering.parse({"preset": name})
    output.require_extras()
    work = _on_answers(text, asked, how) if asked.sources(text) else _on_texts(chosen, text, how)
    loaded_profile = confsteer.Profile.load(profile)
    folder = _writable_folder(profile, out)
    result = work(chosen.load(), loaded_profile).model_copy(update={"given": chosen.model or ""})

    # Save the preset first: pictures and pages can be made again.
    console = output.console()
    if isinstance(result, Tuning):
        tables.print_tuning(console, result)
    else:
        print_answer_tuning(console, result)
    if result.gained:
        loaded_profile.with_preset(name, result.steering).save(folder)
        console.print(f"Preset {tables.escape(name)} written to {tables.escape(str(folder))}")
        if result.temperature is not None:
            console.print(f"It was tuned for sampling at temperature {result.temperature:.3f}, which a preset cannot hold.")
    else:
        rival = "neutral" if isinstance(result, Tuning) else "the temperature"
        console.print(f"[bold]Nothing saved:[/bold] on the validation split it does not beat {rival} beyond the interval.")
    output.write(console, result)
    output.write_report(console, result, loaded_profile)
    if not result.gained:
        sys.exit(EXIT_NOTHING_GAINED)


def _on_texts(chosen: ModelOptions, text: WindowedTextOptions, how: TuningOptions) -> Work:
    """Name the texts now. Tune on them when there is a model."""
    from confsteer.text.sources import by_title

    sources = by_title(text.sources(chosen.model, "calibration"))
    if not sources:
        raise click.UsageError(f"{NO_TEXT}, or questions: --choices PATH")

    def work(loaded: LoadedModel, profile: Profile) -> Tuning:
        texts = {title: text.windows(source, loaded) for title, source in sources.items()}
        return confsteer.tune(loaded.model, loaded.tokenizer, texts, profile, **how.settings())

    return work


def _on_answers(text: WindowedTextOptions, asked: QuestionOptions, how: TuningOptions) -> Work:
    """Read the questions now. Tune on them when there is a model."""
    from confsteer.evaluation.run_file import Run
    from confsteer.tuning.tune_answers import tune_answers

    if text.texts:
        raise click.UsageError("give --text or --choices, not both: one is tuned for tokens, the other for answers")
    if how.objective != defaults.OBJECTIVE or how.temperature:
        raise click.UsageError(
            "--objective and --temperature are for texts: answers are tuned for their loss, with a temperature"
        )
    settings = Run.model_validate({"profile": "", "choices": asked.sources(text), **asked.wording(text.chat)})
    questions, wordings = settings.choice_questions(), settings.wordings()

    def work(loaded: LoadedModel, profile: Profile) -> AnswerTuning:
        settings = how.settings()
        return tune_answers(
            loaded.model,
            loaded.tokenizer,
            questions,
            profile,
            wordings=wordings,
            parameters=settings["parameters"],
            ridge=settings["ridge"],
            seed=settings["seed"],
            progress=True,
        )

    return work


def _writable_folder(profile: str, out: Path | None) -> Path:
    """Choose the folder of the profile with its preset.

    Raises:
        click.UsageError: there is none, or it cannot be written to.
    """
    folder = out or Path(profile)
    if out is None and not folder.is_dir():
        raise click.UsageError(
            f"{profile} is not a folder on this machine: say with --out where to write the profile with the preset"
        )
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        raise click.UsageError(f"{folder} cannot be written to: say with --out where to write the profile with its preset")
    return folder
