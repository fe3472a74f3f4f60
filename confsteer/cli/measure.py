"""Commands that measure the effect of steering on predictions: eval, report, lm-eval."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

import confsteer
from confsteer import bars
from confsteer.cli.options import (
    EXIT_INTERRUPTED,
    NO_TEXT,
    OUTPUT_FILE,
    PROFILE,
    TEXT_FILE,
    ModelOptions,
    OutputOptions,
    QuestionOptions,
    WindowedTextOptions,
    grouped,
    model_options,
    output_options,
    question_options,
    steer_option,
    windowed_text_options,
)
from confsteer.defaults import SAMPLES
from confsteer.files import write_result
from confsteer.report import tables
from confsteer.report.answer_tables import evaluation_tables, print_answer_calibration, print_choices
from confsteer.report.columns import TableConsole, write_csv
from confsteer.report.written_tables import print_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from confsteer.evaluation.evaluate import Evaluation
    from confsteer.evaluation.run_file import Run
    from confsteer.profile.profile import Profile

BESIDE_A_RUN_FILE = (
    *("run_file", "as_json", "plot", "report", "answers", "wide", "as_markdown", "as_csv"),
    *("gguf_file", "device", "dtype", "revision", "trust_remote_code"),
)
"""Options that are allowed beside a run file, because they are not in it."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Request on the command line, in place of a run file."""

    profile: str | None
    steers: tuple[str, ...]
    sweeps: tuple[str, ...]
    text: WindowedTextOptions
    unigram: Path | None
    asked: QuestionOptions
    questions: tuple[Path, ...]
    samples: int
    by: str | None
    smooth_ece: bool
    induction: bool

    def run(self, model: str | None) -> Run:
        """Turn the options into a run."""
        from confsteer.evaluation.run_file import Run
        from confsteer.text.short_questions import ShortQuestionSource

        if self.profile is None:
            raise click.UsageError("give a profile, -p PROFILE, or a run file, --run FILE.yaml")
        text, short = self.text, [ShortQuestionSource(path=path) for path in self.questions]
        if text.dataset and not text.field:
            dataset = ShortQuestionSource(dataset=text.dataset, config=text.config, split=text.split)
            short += [dataset] if dataset.looks_like_questions() else []
        questions = self.asked.sources(text, short=bool(short))
        if questions and short and self.asked.shots:
            raise click.UsageError("--shots are examples of --choices or of --questions: ask one of them at a time")
        is_text = text.dataset is not None and all(one.dataset is None for one in (*questions, *short))
        if (questions or short) and not (text.texts or is_text):
            # Take the options of a text for the questions.
            if text.field or text.join:
                raise click.UsageError("--field and --join are for texts, and there are none: give some with --text PATH")
            sources = []
        else:
            sources = text.sources(model, "held-out")
        if not (sources or questions or short):
            raise click.UsageError(
                f"{NO_TEXT}, or questions: --choices PATH, --questions PATH (on samples of its own every model is calibrated)"
            )
        return Run(
            model=model,
            profile=self.profile,
            texts=tuple(sources),
            steerings=self.steers,
            sweeps=self.sweeps,
            tokens=self.text.tokens,
            window=self.text.window,
            unigram=self.unigram,
            choices=tuple(questions),
            questions=tuple(short),
            samples=self.samples,
            **self.asked.wording(text.chat),
            by=self.by,
            smooth_ece=self.smooth_ece,
            induction=self.induction,
        )


run_options = grouped(
    "request",
    RunOptions,
    click.option("-p", "--profile", type=PROFILE, help="Folder, shipped name or hub repository."),
    steer_option,
    click.option(
        "--sweep",
        "sweeps",
        multiple=True,
        metavar="KEY=FIRST:LAST:N",
        help="N steerings, such as entropy=-0.2:1.2:8; repeatable.",
    ),
    windowed_text_options(None, "Read at most this many of each text.  [default: all]"),
    click.option("--unigram", type=TEXT_FILE, metavar="FILE.npy", help="Token counts by id.  [default: counted in each text]"),
    question_options,
    click.option(
        "--questions",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="PATH",
        help='Questions to which the model writes the answer, a line {"question": ..., "answers": [...]}, or as benchmarks have '
        "them; repeatable.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=2),
        default=SAMPLES,
        show_default=True,
        metavar="N",
        help="Samples of each answer that the model writes: how many of them agree is a confidence.",
    ),
    click.option("--by", metavar="FIELD", help="Group --choices by this field of their records, such as subject."),
    click.option("--smooth-ece", is_flag=True, help="Compute smooth ECE too, which is slow; needs confsteer[smooth-ece]."),
    click.option("--induction", is_flag=True, help="Measure repeated text too: see confsteer study induction."),
)


@click.command(name="eval", short_help="Compare loss, entropy and calibration with and without steering.")
@model_options
@run_options
@click.option("--run", "run_file", type=TEXT_FILE, metavar="FILE.yaml", help="Take all of this from a file.")
@output_options
@click.option(
    "--answers", type=OUTPUT_FILE, metavar="FILE.jsonl", help="Write every question's answer, a line for each way to answer it."
)
def evaluate(
    chosen: ModelOptions, request: RunOptions, run_file: Path | None, output: OutputOptions, answers: Path | None
) -> None:
    """Compare loss, entropy and calibration: unsteered, with each --steer, and with the temperatures that it has to beat.

    \b
    confsteer eval -p confsteer-demo -s entropy=-0.15 -s entropy=0.3 --report report.html
    confsteer eval ./my-model -p my-profile --text wiki.jsonl --text code.jsonl --sweep entropy=-0.2:1:7 --json results.json
    confsteer eval ./my-chat-model -p my-profile --text chats.jsonl --chat -s preset=calibrated
    confsteer eval --run eval/demo.yaml

    Each --text is a text of its own. Each steering has a temperature beside it, at which the unsteered model has the same
    mean entropy. A difference between the two is what neurons know beyond a temperature.

    Questions:

    \b
    confsteer eval ./my-chat-model -p my-profile --choices mmlu.jsonl --format letters --chat --by subject -s entropy=0.5
    confsteer eval ./my-model -p my-profile --choices sat.jsonl --format text --format letters --answers answers.jsonl
    confsteer eval ./my-model -p my-profile --dataset allenai/ai2_arc --config ARC-Easy --split test --shots examples.jsonl

    --choices takes JSON lines, a JSON list, MMLU's CSV, or a folder of these. --dataset takes a dataset if its records are
    questions. Questions are recognised by their fields. They may be plain (--choices, below), or from AGIEval, MMLU, ARC,
    CommonsenseQA, OpenBookQA, HellaSwag, PIQA, BoolQ or WinoGrande. Samples that lm-eval logs are read too, and asked as they
    were there. Without --format letters, --template, --shots and --chat, questions are worded as lm-eval words ARC.

    The confidence in an answer is its share of the probability of all choices. A steering has to beat a temperature on these.
    Other baselines are chance, a temperature with the length of the choice, and log-likelihoods per character and per token.

    Answers in the model's own words:

    \b
    confsteer eval ./my-model -p my-profile --questions trivia.jsonl --shots examples.jsonl -s entropy=-0.3 -s entropy=0.3
    confsteer eval ./my-chat-model -p my-profile --questions gsm8k.jsonl --chat --limit 200 --samples 10 --answers answers.jsonl

    --questions takes plain questions, those of TriviaQA, NaturalQuestions-open, SQuAD and GSM8K, and samples that lm-eval
    logs in tasks that generate. The model writes the likeliest answer, unsteered and with each --steer. It is right if it
    equals an accepted answer, except for case, punctuation and articles. If the accepted answer is marked as a number (####
    42), only the last number of the model's answer counts. Five confidences in each answer are compared. They are the
    probability of its tokens, the same per token, the share of --samples that agree, P(True), and a percentage from the
    model. The report shows the prompts verbatim.

    Results are written after each file. Ctrl-C keeps those that are complete (exit code 130).
    """
    from confsteer.evaluation.run_file import Run, Stage, run

    output.require_extras()
    if request.smooth_ece:
        import relplot  # noqa: F401
    if run_file:
        _refuse_options_beside_a_run_file()
        settings = Run.read(run_file)
    else:
        settings = request.run(chosen.model)
    if output.plot and not settings.sources():
        raise click.UsageError("--plot draws texts, and there are none: --report has pictures of questions")
    if answers and not (settings.choices or settings.questions):
        raise click.UsageError("--answers is for questions, and there are none: give some with --choices or --questions PATH")
    # Check the request before the model is loaded.
    settings.all_steerings()
    questions, short = settings.choice_questions(), settings.short_questions()
    _ = settings.wordings() if questions else None, settings.short_wording() if short else None

    profile = confsteer.Profile.load(settings.profile)
    loaded = dataclasses.replace(chosen, model=settings.model).load()
    stage: Stage | None = None
    lines: list[str] = []
    interrupted = False
    try:
        for stage in run(settings, profile, loaded, questions, short, progress=True):
            output.keep(stage.result)
            if answers and stage.answered:
                lines += [json.dumps(record, ensure_ascii=False) + "\n" for record in stage.answered.records()]
                write_result(answers, "".join(lines).encode())
    except KeyboardInterrupt:
        if stage is None:
            raise
        interrupted = True
        bars.stop()
        click.echo("Interrupted: what follows is of the files that were done.", err=True)
    assert stage is not None
    console = output.console()
    _print(console, stage.result, profile, settings, as_csv=output.as_csv)
    output.write(console, stage.result, _draw_reliability)
    if answers:
        console.print(f"Written: {tables.escape(str(answers))}")
    output.write_report(console, stage.result, profile)
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)


def _print(console: TableConsole, result: Evaluation, profile: Profile, settings: Run, *, as_csv: bool) -> None:
    if as_csv:
        write_csv(sys.stdout, evaluation_tables(result))
        if result.induction:
            console.print("CSV has no place for the repeated text of --induction: --json FILE has.")
        return
    if result.texts:
        tables.print_evaluation(console, result)
    for answers in result.choices:
        print_choices(console, result.name, answers)
    for written in result.written:
        print_written(console, result.name, written)
    tables.print_dial_effects(console, tables.steered_dials(profile, settings.all_steerings()))
    if result.induction:
        tables.print_induction(console, result.induction)


def _refuse_options_beside_a_run_file() -> None:
    """Raise UsageError if an option was given that belongs in the run file."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
        if given and parameter.name not in BESIDE_A_RUN_FILE:
            raise click.UsageError(f"--run FILE says what to run, {parameter.opts[0]} too: give it in the file")


def _draw_reliability(result: Evaluation) -> Figure:
    from confsteer.report.plots import plot_reliability

    return plot_reliability(result)


@click.command(short_help="Write an evaluation or a tuning as one HTML file.")
@click.argument("results", metavar="RESULTS.json", type=TEXT_FILE)
@click.option("-p", "--profile", type=PROFILE, help="Draw its neurons and dials too: folder, shipped name or hub repository.")
@click.option("--out", type=OUTPUT_FILE, metavar="FILE.html", help="Where to write it.  [default: beside RESULTS.json]")
def report(results: Path, profile: str | None, out: Path | None) -> None:
    """Make a report of RESULTS.json, from eval or tune: one HTML file that needs no other file.

    \b
    confsteer eval -p confsteer-demo -s entropy=0.3 --json results.json
    confsteer report results.json -p confsteer-demo
    """
    from confsteer.report.page import write_report
    from confsteer.report.results import read_result

    file = out or results.with_suffix(".html")
    write_report(read_result(results), file, confsteer.Profile.load(profile) if profile else None)
    tables.console().print(f"Written: {tables.escape(str(file))}")


@click.command(
    name="lm-eval",
    context_settings={"ignore_unknown_options": True},
    short_help="Run lm-eval's tasks on a steered model, and rate its confidence.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[LM-EVAL OPTION]...")
def lm_eval_tasks(options: tuple[str, ...]) -> None:
    """Run lm-eval's tasks on a steered model. All options are lm-eval's: lm-eval run --help.

    \b
    confsteer lm-eval --tasks arc_easy --limit 100 --model_args profile=confsteer-demo "steering=entropy=0.3 scale.767=0"
    confsteer lm-eval --tasks gsm8k --model_args pretrained=OWNER/MODEL,profile=my-profile,steering=preset=calm
    confsteer lm-eval --tasks mmlu --model_args '{"pretrained": "OWNER/MODEL", "profile": "p", "steering": {"entropy": 0.2}}'
    confsteer lm-eval --tasks my_task --include_path folder --batch_size 16 --output_path results --model_args ...

    --model_args takes profile (folder, shipped name or hub repository) and steering, and all arguments of lm-eval's hf model.
    Without these two the model is not steered. Without pretrained it is the bundled one.

    After lm-eval's results comes the calibration of the answers to multiple-choice tasks. The confidence in an answer is its
    share of the probability of all choices. --output_path writes it beside lm-eval's results. --use_cache FILE does not note
    the steering of an answer: use one file per steering.

    --model NAME takes another of lm-eval's models. In vllm, confsteer's plugin steers:

    \b
    confsteer lm-eval --tasks mmlu --model vllm --model_args '{"pretrained": "OWNER/MODEL",
        "additional_config": {"confsteer": {"profile": "my-profile", "default": "entropy=0.2"}}}'
    """
    from confsteer.evaluation.lm_eval_model import run

    calibrations, file = run(options)
    if calibrations:
        print_answer_calibration(tables.console(wide=True), calibrations)
    if file:
        tables.console().print(f"Written: {tables.escape(str(file))}")
