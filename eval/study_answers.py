"""Are a chat model's answers to multiple-choice questions calibrated, and does turning its neurons help?

    OMP_NUM_THREADS=1 python eval/study_answers.py MODEL -p PROFILE --choices mmlu.jsonl --choices agieval --limit 200

Every set of questions is asked in four ways: for the text of a choice and for its letter, as plain text and through the chat
template. Writes ``results.json``, ``table.md`` and ``report.html`` into ``eval/study_answers`` after each; what was written
before is read and goes on, so that a run that was cut off can be started again.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from confsteer import Profile, Steering
from confsteer.evaluation.choices import ChoiceComparison, answer
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.metrics import METRICS
from confsteer.evaluation.reader import Reader
from confsteer.evaluation.run_file import Run
from confsteer.model.loading import load_model
from confsteer.report.answer_findings import answer_findings
from confsteer.report.answer_tables import fitted_in_words
from confsteer.report.page import write_report
from confsteer.report.results import read_result
from confsteer.text.prompts import Wording

OUT = Path(__file__).parent / "study_answers"
WORDINGS = [Wording(form, chat=chat) for chat in (False, True) for form in ("text", "letters")]
COLUMNS = ("accuracy", "loss", "ece", "argmax_changed")


@click.command()
@click.argument("model")
@click.option("-p", "--profile", required=True)
@click.option("--choices", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--limit", type=int)
@click.option("-s", "--steer", "steers", multiple=True, default=("entropy=-0.2", "entropy=0.5", "entropy=1"))
def main(model: str, profile: str, choices: tuple[Path, ...], limit: int | None, steers: tuple[str, ...]) -> None:
    """Ask and compare, and write after each set of questions."""
    settings = Run.model_validate({"profile": profile, "choices": choices, "limit": limit})
    questions, steerings = settings.choice_questions(), [Steering.parse(text) for text in steers]
    loaded_profile, loaded = Profile.load(profile), load_model(model)
    reader = Reader(loaded.model, loaded_profile)
    OUT.mkdir(exist_ok=True)
    result = Evaluation.begin(loaded_profile, Path(model).name)
    if (OUT / "results.json").exists():
        written = read_result(OUT / "results.json")
        assert isinstance(written, Evaluation)
        result = written
    for source, asked in questions.items():
        for wording in WORDINGS:
            if (source, wording.title) in {(one.source, one.wording) for one in result.choices}:
                continue
            began = time.process_time()
            found = answer(reader, loaded.tokenizer, {source: asked}, steerings, wordings=[wording], progress=True)
            result = result.model_copy(update={"choices": (*result.choices, next(found).comparison)})
            print(f"{source}, {wording.title}: {time.process_time() - began:.0f} s of a core", flush=True)
            (OUT / "results.json").write_text(result.model_dump_json(indent=1) + "\n")
    (OUT / "table.md").write_text("\n".join(table(one) for one in result.choices))
    write_report(result, OUT / "report.html", loaded_profile)


def table(compared: ChoiceComparison) -> str:
    """Write the rows of a comparison and what follows from them."""
    lines = [
        f"## {compared.title}: {compared.questions} questions",
        "",
        "| | " + " | ".join(METRICS[name].label for name in COLUMNS) + " | Δ loss to the fitted temperature |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in compared.rows:
        if row.kind == "matched temperature":
            continue
        fitted = fitted_in_words(row)
        cells = [row.name + (f" ({fitted})" if fitted else "")]
        for name in COLUMNS:
            interval, number = row.metrics.get(name), METRICS[name].number
            cells.append(f"{number(interval.value)} ({number(interval.low)} to {number(interval.high)})" if interval else "")
        gain, number = row.minus.get("temperature", {}).get("loss"), METRICS["loss"].number
        said = (number(value, sign=True) for value in gain) if gain else ()
        cells.append("{} ({} to {})".format(*said) if gain else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {one.question} **{one.answer}** {one.lead}".rstrip() for one in answer_findings(compared)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
