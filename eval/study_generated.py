"""Is a small model's confidence in what it writes worth something, and does turning its neurons help?

    OMP_NUM_THREADS=1 python eval/study_generated.py MODEL -p PROFILE --mmlu mmlu/test.jsonl

Two sets of short questions, both asked after the same four examples. ``facts`` are capitals, opposites and sums, written here.
``mmlu`` are questions of MMLU that can be asked without their choices (see `open_ended`), the right choice being the accepted
answer. Writes ``results.json``, ``answers.jsonl``, ``table.md`` and ``report.html`` into ``eval/study_generated``. Of MMLU they
have line numbers and no text.
"""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import click

from confsteer import Profile, Steering
from confsteer.evaluation.confidences import CONFIDENCES
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.metrics import METRICS
from confsteer.evaluation.reader import Reader
from confsteer.evaluation.written import WrittenAnswered, WrittenComparison, answer_in_words
from confsteer.model.loading import load_model
from confsteer.report.page import write_report
from confsteer.report.written_findings import written_findings
from confsteer.report.written_tables import fitting_in_words
from confsteer.text.prompts import ShortWording
from confsteer.text.questions import read_questions
from confsteer.text.short_questions import ShortQuestion

OUT = Path(__file__).parent / "study_generated"
COLUMNS = ("accuracy", "ece", "brier", "auroc", "coverage_area")
CAPITALS = (
    "France Paris,Italy Rome,Germany Berlin,Spain Madrid,Portugal Lisbon,Greece Athens,Austria Vienna,Hungary Budapest,Poland "
    "Warsaw,Russia Moscow,Japan Tokyo,China Beijing,Egypt Cairo,Kenya Nairobi,Canada Ottawa,Cuba Havana,Peru Lima,Chile "
    "Santiago,Turkey Ankara,Iran Tehran,Iraq Baghdad,India Delhi,Thailand Bangkok,Vietnam Hanoi,Ireland Dublin,Belgium "
    "Brussels,Denmark Copenhagen,Sweden Stockholm,Finland Helsinki,Australia Canberra"
)
OPPOSITES = (
    "hot cold,up down,left right,black white,day night,early late,full empty,good bad,happy sad,hard soft,high low,light dark,"
    "long short,new old,open closed,rich poor,strong weak,true false,wet dry,young old"
)
SHOTS = tuple(
    ShortQuestion(question, (answer,))
    for question, answer in (
        ("What is the capital of Norway?", "Oslo"),
        ("What is the opposite of big?", "small"),
        ("What is 3 plus 4?", "7"),
        ("Who wrote Don Quixote?", "Miguel de Cervantes"),
    )
)
POINTING = re.compile(r"following|above|below|these|statement|passage|_|\bnot\b|except|\bbest\b|\bmost\b", re.IGNORECASE)
"""Words of questions that need their choices, or have several answers."""


def facts() -> list[ShortQuestion]:
    """Make questions that a small model may know some of."""
    found = []
    for pair in CAPITALS.split(","):
        country, capital = pair.split()
        accepted = (capital, "New Delhi") if capital == "Delhi" else (capital,)
        found.append(ShortQuestion(f"What is the capital of {country}?", accepted))
    for pair in OPPOSITES.split(","):
        word, opposite = pair.split()
        found.append(ShortQuestion(f"What is the opposite of {word}?", (opposite,)))
    found += [ShortQuestion(f"What is {a} plus {b}?", (str(a + b),)) for a, b in zip(range(2, 12), range(9, 49, 4), strict=True)]
    return [question._replace(id=str(i)) for i, question in enumerate(found)]


def open_ended(file: Path, number: int) -> list[ShortQuestion]:
    """Draw questions that stand without their choices: they end in a question mark, the right choice has up to three words."""
    found = []
    for line, question in enumerate(read_questions([file]), start=1):
        right = question.choices[question.answer].rstrip(".")
        short = len(right.split()) <= 3 and len(question.question.split()) <= 25
        if short and question.question.endswith("?") and not POINTING.search(question.question):
            found.append(ShortQuestion(question.question, (right,), id=str(line)))
    chosen = sorted(random.Random(0).sample(range(len(found)), number))
    print(f"{number} of {len(found)} questions of {file.name} that can be asked without choices")
    return [found[i] for i in chosen]


@click.command()
@click.argument("model")
@click.option("-p", "--profile", required=True)
@click.option("--mmlu", required=True, type=click.Path(path_type=Path))
@click.option("--number", default=60, help="Questions of MMLU.")
@click.option("-s", "--steer", "steers", multiple=True, default=("entropy=-0.3", "entropy=0.3"))
def main(model: str, profile: str, mmlu: Path, number: int, steers: tuple[str, ...]) -> None:
    """Ask and compare, and write after each set of questions."""
    loaded_profile, loaded = Profile.load(profile), load_model(model)
    reader, steerings = Reader(loaded.model, loaded_profile), [Steering.parse(text) for text in steers]
    OUT.mkdir(exist_ok=True)
    result = Evaluation.begin(loaded_profile, Path(model).name)
    lines: list[str] = []
    began = time.process_time()
    sets = {"facts": facts(), "mmlu": open_ended(mmlu, number)}
    for found in answer_in_words(
        reader, loaded.tokenizer, sets, steerings, wording=ShortWording(shots=SHOTS), samples=5, progress=True
    ):
        print(f"{found.comparison.source}: {time.process_time() - began:.0f} s of a core so far", flush=True)
        compared = found.comparison if found.comparison.source == "facts" else without_text(found)
        result = result.model_copy(update={"written": (*result.written, compared)})
        lines += [json.dumps(numbers(record)) + "\n" for record in found.records()]
        (OUT / "results.json").write_text(result.model_dump_json(indent=1) + "\n")
        (OUT / "answers.jsonl").write_text("".join(lines))
        (OUT / "table.md").write_text("\n".join(table(one) for one in result.written))
        write_report(result, OUT / "report.html", loaded_profile)


def without_text(found: WrittenAnswered) -> WrittenComparison:
    """Leave the question and the answer out of what is shown verbatim."""
    question, answer = found.sample.questions[0].question, found.sample.ways[0].texts[0]
    prompts = {
        name: text.replace(question, "{question}").replace(f"Proposed Answer: {answer}", "Proposed Answer: {answer}")
        for name, text in found.comparison.prompts.items()
    }
    return found.comparison.model_copy(update={"prompts": prompts})


def numbers(record: dict[str, object]) -> dict[str, object]:
    """Leave the texts out of an answer's record."""
    return {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in record.items()
        if key not in ("answer", "accepted", "wording", "block")
    }


def table(compared: WrittenComparison) -> str:
    """Write the rows of a comparison and what follows from them."""
    lines = [f"## {compared.title}: {compared.questions} questions", ""]
    lines += ["| | right | changed | became right | became wrong | cut off | empty |", "|" + "---|" * 7]
    for one in compared.answers:
        counts = (one.right, one.changed, one.became_right, one.became_wrong, one.cut_off, one.empty)
        lines.append(f"| {one.name} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| | stated | " + " | ".join(METRICS[name].label for name in COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for confidence in compared.confidences:
        for row in confidence.rows:
            fitted = fitting_in_words(confidence.confidence, row)
            cells = [f"{CONFIDENCES[confidence.confidence]}, {row.name}" + (f" ({fitted})" if fitted else "")]
            cells.append(str(confidence.stated(row)))
            for name in COLUMNS:
                interval, number = row.metrics.get(name), METRICS[name].number
                cells.append("{} ({} to {})".format(*map(number, interval)) if interval else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {one.question} **{one.answer}** {one.lead}".rstrip() for one in written_findings(compared)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
