"""The files that ``confsteer eval --json`` and ``confsteer tune --json`` wrote, read back."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from confsteer.errors import ResultError, first_problem
from confsteer.evaluation.choices import ChoiceComparison
from confsteer.evaluation.comparison import TextComparison
from confsteer.evaluation.evaluate import Evaluation
from confsteer.files import MAX_RESULT_BYTES, read_at_most
from confsteer.report.findings import JUDGED
from confsteer.tuning.tune import Tuning
from confsteer.tuning.tune_answers import AnswerTuning


def read_result(file: Path) -> Evaluation | Tuning | AnswerTuning:
    """The evaluation or the tuning that ``confsteer eval --json`` or ``confsteer tune --json`` wrote.

    Raises:
        ResultError: the file is neither.
    """
    way_out = "Write one with confsteer eval … --json FILE or confsteer tune … --json FILE"
    try:
        document = json.loads(read_at_most(file, MAX_RESULT_BYTES))
    except OSError as error:
        raise ResultError(f"cannot read {file}: {error.strerror}. {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{file} is not JSON: {error}. {way_out}") from error
    if not isinstance(document, dict):
        raise ResultError(f"{file} is JSON, but a list or a value where an evaluation or a tuning is an object. {way_out}")
    # Only a tuning has an objective, or on answers a temperature alone; the class then says what is wrong with the rest.
    kind: type[Evaluation] | type[Tuning] | type[AnswerTuning] = Evaluation
    if "objective" in document or "alone" in document:
        kind = Tuning if "objective" in document else AnswerTuning
    try:
        result = kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        problem = first_problem(error, whole="the document")
        raise ResultError(f"{file} is not of this version's {kind.__name__.lower()}: {problem}. {way_out}") from error
    compared: list[TextComparison | ChoiceComparison] = [] if isinstance(result, AnswerTuning) else [*result.texts]
    compared += result.left_out if isinstance(result, Tuning) else result.choices
    for one in compared:
        if not one.rows or one.rows[0].kind != "neutral":
            raise ResultError(f"{file}: the first row of {one.source!r} is not neutral, which all others are compared with")
        for row in one.rows:
            if row.kind == "chance":
                continue
            needed = {*JUDGED, "argmax_changed", "kl_model_unigram"} if isinstance(one, TextComparison) else {*JUDGED}
            missing = needed - row.metrics.keys()
            if row.kind == "steering":
                missing |= {f"{name} less neutral's" for name in {"entropy", *JUDGED} - row.minus.get("neutral", {}).keys()}
            if missing:
                raise ResultError(f"{file}: {row.name!r} on {one.source!r} has no {', '.join(sorted(missing))}. {way_out}")
    for asked in result.written if isinstance(result, Evaluation) else ():
        for confidence in asked.confidences:
            rows = confidence.rows
            if not rows or rows[0].kind != "neutral":
                raise ResultError(f"{file}: the first {confidence.confidence!r} on {asked.source!r} is not neutral. {way_out}")
            if without := [row.name for row in rows if row.reliability and "ece" not in row.metrics]:
                raise ResultError(f"{file}: {without[0]!r} on {asked.source!r} has no ece. {way_out}")
        if not asked.answers:
            raise ResultError(f"{file}: {asked.source!r} has no answers. {way_out}")
    return result
