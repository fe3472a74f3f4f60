"""Commands that measure what steering does: eval, lm-eval, study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from confsteer import tables
from confsteer.cli.options import (
    NO_TEXT,
    TextOptions,
    json_option,
    load,
    model_options,
    plot_option,
    profile_option,
    steer_option,
    text_options,
    window_option,
    write,
)
from confsteer.profile import Profile


@click.command(name="eval")
@model_options
@profile_option
@steer_option
@text_options
@window_option
@click.option("--tokens", type=click.IntRange(min=1), help="Read at most this many.  [default: all]")
@json_option
@plot_option
def evaluate(
    model: str | None,
    profile: str,
    steers: tuple[str, ...],
    text: TextOptions,
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
    loaded = load(model, loading)
    result = run(
        loaded.model,
        loaded.tokenizer,
        text.windows(*given, loaded.tokenizer, window, tokens),
        loaded_profile,
        steerings,
        progress=True,
    )
    console = tables.console()
    for compared in result.texts:
        tables.print_comparison(console, result.model, compared)
    write(console, result, as_json, plot, "plot_reliability")


@click.command(name="lm-eval", context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[LM-EVAL OPTION]...")
def lm_eval_tasks(options: tuple[str, ...]) -> None:
    """Run lm-eval's tasks on a steered model. All options are lm-eval's: lm-eval run --help.

    \b
    confsteer lm-eval --tasks arc_easy --limit 100 --model_args profile=confsteer-demo "steering=entropy=0.3 scale.757=0"
    confsteer lm-eval --tasks gsm8k --model_args pretrained=OWNER/MODEL,profile=my-profile,steering=preset=calm
    confsteer lm-eval --tasks mmlu --model_args '{"pretrained": "OWNER/MODEL", "profile": "p", "steering": {"entropy": 0.2}}'
    confsteer lm-eval --tasks my_task --include_path folder --batch_size 16 --output_path results --model_args ...

    --model_args takes profile (folder, shipped name or hub repository) and steering besides what lm-eval's hf model takes.
    Without these two the model is not steered; without pretrained it is the bundled one.

    After lm-eval's results comes the calibration of the answers to multiple-choice tasks: the confidence in an answer is its
    share of the probability of all choices. --output_path writes it beside lm-eval's results. --use_cache FILE does not know
    what gave an answer: use one file per steering.

    --model NAME takes another of lm-eval's models. In vllm it is confsteer's plugin that steers:

    \b
    confsteer lm-eval --tasks mmlu --model vllm --model_args '{"pretrained": "OWNER/MODEL",
        "additional_config": {"confsteer": {"profile": "my-profile", "default": "entropy=0.2"}}}'
    """
    from confsteer.evaluation.lm_eval_model import run

    calibrations, file = run(options)
    if calibrations:
        tables.print_answer_calibration(tables.console(), calibrations)
    if file:
        tables.console().print(f"Written: {escape(str(file))}")


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
    from confsteer.corpus import leading_ids
    from confsteer.evaluation.induction import induction as run

    loaded_profile = Profile.load(profile)
    given = text.documents(model, "held-out")
    loaded = load(model, loading)
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
    from confsteer.evaluation.cumulative import cumulative as run

    loaded_profile = Profile.load(profile)
    given = text.documents(model, "held-out")
    if given is None:
        raise click.UsageError(NO_TEXT)
    loaded = load(model, loading)
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
    write(console, result, as_json, plot, "plot_cumulative")
