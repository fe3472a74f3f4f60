"""Tables of real results fit their lines; Markdown and CSV are of the same columns."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from confsteer import Profile
from confsteer.calibration.published import PublishedList, PublishedModel
from confsteer.evaluation.choices import AnswerGroup, AnswerGroups
from confsteer.evaluation.comparison import Row, TextComparison
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.metrics import METRICS
from confsteer.files import shipped_profiles
from confsteer.report import tables
from confsteer.report.answer_tables import evaluation_tables, print_choices
from confsteer.report.columns import GAP, MARK, WIDTH, Column, Measured, Table, TableConsole, shortened, write_csv
from confsteer.results.bootstrap import Interval
from confsteer.studies.cumulative import CumulativeStudy
from confsteer.studies.induction import InductionStudy
from tests.paths import ROOT

LONG = "entropy=+0.25 unigram=-0.125 scale.entropy=0.5 scale.1757=0 clamp.763=0:2 positions=generated"
"""Longer than a line has room for."""


@functools.cache
def answered() -> Evaluation:
    """Eight sets of answers of SmolLM2, the first in groups, with a steering of a long name."""
    result = Evaluation.model_validate_json((ROOT / "eval/study_answers/results.json").read_text())
    first, *others = result.choices
    named = [row.model_copy(update={"name": LONG}) if row.kind == "steering" else row for row in first.rows]
    first = first.model_copy(update={"rows": tuple(named)})
    groups = tuple(
        AnswerGroup(name=f"high_school_european_history_{i}", questions=1_000, metrics=tuple(row.metrics for row in first.rows))
        for i in range(2)
    )
    grouped = AnswerGroups(by="subject", groups=groups, macro=groups[0].metrics)
    return result.model_copy(update={"choices": (first.model_copy(update={"grouped": grouped}), *others)})


@functools.cache
def read() -> Evaluation:
    """A text that the bundled model was measured on, with eight rows, long names among them."""
    found = json.loads((ROOT / "eval/study_calibration/results.json").read_text())["results"]
    kinds: dict[str, Any] = {"neutral": "neutral", "temperature": "temperature", "null write": "null write"}
    rows = []
    for where, ways in found["all"].items():
        for name, row in ways.items():
            named: dict[str, Any] = {"name": name if name in kinds else f"{LONG} {name}", "kind": kinds.get(name, "steering")}
            minus = {kind: {m: Interval(*values) for m, values in by.items()} for kind, by in row["minus"].items()}
            metrics = {metric: Interval(*values) for metric, values in row["metrics"].items()}
            minus |= {"neutral": {m: Interval(*v) for m, v in zip(("loss", "ece"), list(metrics.values()), strict=False)}}
            minus |= {"matched temperature": minus["neutral"]} if named["kind"] == "steering" else {}
            rows.append(Row.model_construct(**named, values=tuple(row["values"]), metrics=metrics, minus=minus))
        text = TextComparison.model_construct(
            source=where,
            tokens=12_345_678,
            windows=54_321,
            blocks=54_321,
            unit="documents",
            vocab_size=4_096,
            rows=tuple(rows[:8]),
        )
    return answered().model_copy(update={"texts": (text,), "choices": ()})


class Kept(TableConsole):
    """A console that keeps the tables it is given, and what is printed."""

    def __init__(self, width: int = WIDTH, **how: Any) -> None:
        super().__init__(file=io.StringIO(), width=width, **how)
        self.tables: list[Table[Any]] = []

    def table(self, table: Table[Any]) -> None:
        self.tables.append(table)
        super().table(table)

    @property
    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


def print_answers(console: TableConsole) -> None:
    for compared in answered().choices:
        print_choices(console, "SmolLM2", compared)


def print_profiles(console: TableConsole) -> None:
    for name in shipped_profiles():
        tables.print_profile(console, Profile.load(name))
        tables.print_near_misses(console, Profile.load(name))


def print_scans(console: TableConsole) -> None:
    """A profile whose measurements are left out is printed as a scan, and beside what was published of another model."""
    profile = Profile.load("confsteer-demo")
    tables._print_scan(console, profile)
    lists = [
        PublishedList(source="them", kind="entropy", neurons=(760, 3, 12)),
        PublishedList(source="others", kind="null fraction", neurons=(760, 761), null_fraction={760: 0.99, 761: 0.5}),
    ]
    known = PublishedModel(id="a/b", layer=3, lists=tuple(lists))
    tables.print_agreement(console, profile, known)


def print_studies(console: TableConsole) -> None:
    for name in shipped_profiles():
        found = json.loads((ROOT / "eval/reproduce_paper" / name / "report.json").read_text())
        tables.print_induction(console, InductionStudy.model_validate_json(json.dumps(found["induction"])))
        if found["cumulative"]:
            tables.print_cumulative(console, CumulativeStudy.model_validate_json(json.dumps(found["cumulative"])))


def print_texts(console: TableConsole) -> None:
    tables.print_evaluation(console, read())


PRINTERS = [print_texts, print_answers, print_profiles, print_scans, print_studies]


def words(line: str) -> str:
    return " ".join(line.split())


@pytest.mark.parametrize("show", PRINTERS)
def test_tables_fit_a_hundred_characters_and_fold_and_cut_nothing_but_names(show: Callable[[TableConsole], None]) -> None:
    console = Kept()
    show(console)
    assert console.tables
    printed = set(map(words, console.text.splitlines()))
    for table in console.tables:
        headings, *lines = table.lines(wide=False, width=WIDTH)
        assert "…" not in "".join(headings)
        assert sum(GAP + max(map(cell_len, cells)) for cells in zip(headings, *lines, strict=True)) - GAP <= WIDTH
        assert "…" not in "".join(cell for line in lines for cell in line[1:])
        # Every row is a line of what is printed.
        assert {words(" ".join(line)) for line in (headings, *lines)} <= printed


@pytest.mark.parametrize("show", PRINTERS)
def test_a_narrow_terminal_loses_no_number(show: Callable[[TableConsole], None]) -> None:
    console = Kept(width=80)
    show(console)
    shown = set(console.text.split())
    for table in console.tables:
        assert {word for line in table.lines(wide=False)[1:] for cell in line[1:] for word in cell.split()} <= shown


@pytest.mark.parametrize("show", PRINTERS)
def test_colour_says_nothing_that_is_not_there_without_it(show: Callable[[TableConsole], None]) -> None:
    grey, coloured = Kept(), Kept(force_terminal=True, color_system="standard")
    show(grey)
    show(coloured)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.text) == grey.text


def test_wide_has_every_metric_and_whole_names() -> None:
    for table in evaluation_tables(read()):
        names = {column.name for column in table.shown(wide=True)}
        assert {name for row in table.rows for name in row.metrics} <= names
        assert any(line[0].startswith(LONG) for line in table.lines(wide=True))
        assert {column.heading for column in table.shown(wide=False)} < {column.heading for column in table.shown(wide=True)}


@given(st.tuples(*[st.floats(-1, 1)] * 3).map(sorted), st.sampled_from(["lower", "higher", None]))
def test_a_difference_is_marked_if_its_interval_is_without_zero_and_only_then_coloured(ends: list[float], better: Any) -> None:
    low, value, high = ends
    interval = Interval(value, low, high)
    column: Column[Interval] = Column("x", "x", lambda row: row, ".3f", difference=lambda row: row, better=better)
    assert (column.mark(interval) == MARK) == (low > 0 or high < 0)
    shown = {"lower": "green" if value < 0 else "red", "higher": "green" if value > 0 else "red", None: ""}[better]
    assert column.style(interval) == (shown if column.mark(interval) else "")


def test_a_cell_is_a_value_with_half_the_width_of_its_interval_or_its_error() -> None:
    def shown(value: Any, form: str, *, bare: bool = False) -> str:
        return Column("x", "x", lambda row: row, form, bare=bare).show(value)

    assert shown(Interval(3.412, 3.409, 3.417), ".3f") == "3.412 ±.004"
    assert shown(Interval(-0.5, -2.0, 1.0), "+.2f") == "-0.50 ±1.50"
    assert shown(Interval(0.006, 0.004, 0.008), ".1%", bare=True) == "0.6%"
    assert shown(Measured(0.25, 0.0125), ".4f") == "0.2500 ±.0125"
    assert shown(Measured(0.25, None), ".2f") == "0.25"
    assert shown((1.1, 2.25), ".2f") == "1.10, 2.25"
    assert shown("a\nb\x1b", "") == "a�b�"


@given(st.text(), st.integers(5, 60))
def test_a_name_is_shortened_to_what_there_is_room_for(name: str, most: int) -> None:
    cut = shortened(name, most)
    assert cell_len(cut) <= most
    assert cut == name or "…" in cut


@pytest.mark.parametrize("result", [read, answered])
def test_csv_read_back_is_the_result(result: Callable[[], Evaluation]) -> None:
    file = io.StringIO(newline="")
    write_csv(file, evaluation_tables(result()))
    records = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    expected: list[Any] = []
    expected += [(text, row, None) for text in result().texts for row in text.rows]
    for compared in result().choices:
        expected += [(compared, row, None) for row in compared.rows]
        for group in compared.grouped.groups if compared.grouped else ():
            expected += [(compared, row, group) for row in compared.rows]
    whole = [record for record in records if not record.get("group", "").startswith("mean of")]
    assert len(whole) == len(expected)
    for record, (source, row, group) in zip(whole, expected, strict=True):
        assert (record["source"], record["name"], record["kind"]) == (source.source, row.name, row.kind)
        assert record.get("group", "") == (group.name if group else "")
        metrics = row.metrics if group is None else group.metrics[list(source.rows).index(row)]
        minus: dict[str, dict[str, Interval]] = {} if group else {**row.minus}
        found = {name: metrics.get(name) for name in METRICS}
        for kind in ("neutral", "matched temperature"):
            found |= {f"{m}_minus_{kind.replace(' ', '_')}": minus.get(kind, {}).get(m) for m in ("loss", "ece")}
        for name, interval in found.items():
            numbers = tuple(record.get(column, "") for column in (name, f"{name}_low", f"{name}_high"))
            assert (tuple(map(float, numbers)) == interval) if interval else numbers == ("", "", "")
        assert tuple(map(float, record["fitted"].split())) == row.values


def test_markdown_is_one_table_whatever_names_are() -> None:
    rows = ["a|b", "`c` *d* _e_ <b>", "f\n| g |", "\\|"]
    columns: tuple[Column[str], ...] = (Column("name", "na|me", str), Column("length", "length", len, ",d"))
    title, empty, *lines = Table("t|*", columns, [rows[:2], rows[2:]]).markdown(wide=False).splitlines()
    assert (title, empty) == (r"**t\|\***", "")
    assert len(lines) == 2 + len(rows)
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(columns) + 1
    assert lines[1] == "| :--- | ---: |"


def test_markdown_goes_to_stdout_and_sentences_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = tables.console(markdown=True)
    tables.print_evaluation(console, read())
    out, err = capsys.readouterr()
    assert all(line == "" or line.startswith(("**", "|")) for line in out.splitlines())
    assert "95 % bootstrap interval" in words(err)
    assert "|" not in err
