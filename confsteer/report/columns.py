"""Tables by their columns: one description of each, of which the terminal, Markdown and CSV are made."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TextIO, TypeVar

from rich import box
from rich import table as rich_table
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from confsteer.report.printable import one_safe_line

if TYPE_CHECKING:
    from confsteer.results.bootstrap import Interval

Row = TypeVar("Row")
WIDTH = 100
"""Characters of a line where output goes to a pipe or a file, which have no width of their own."""
MIN_NAME, MAX_NAME, MAX_WIDE_NAME = 16, 40, 200
"""Characters of a row's name, at least, at most, and in lines of any length: a steering of every neuron has thousands."""
GAP = 2
"""Spaces between columns."""
MARK = "*"
"""Stands behind a value that differs beyond its interval: colour alone says nothing to many."""


class Measured(NamedTuple):
    """A mean and its standard error."""

    value: float
    standard_error: float | None


def plus_minus(value: Interval | Measured, form: str) -> str:
    """Write ``5.024 ±.101``: a value and half the width of its interval, or its standard error if it is known.

    Args:
        value: number with its interval or error.
        form: format specification of both.
    """
    error = value.standard_error if isinstance(value, Measured) else (value.high - value.low) / 2
    if error is None:
        return f"{value.value:{form}}"
    return f"{value.value:{form}} ±" + f"{error:{form.lstrip('+')}}".removeprefix("0")


def nothing(_: object) -> None:
    """Hold a row against nothing."""


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: how it is read off a row, and how it is shown."""

    name: str
    """In CSV, where ``NAME_low`` and ``NAME_high``, the ends of an interval, are columns of their own."""
    heading: str
    """For people."""
    read: Callable[[Row], Any]
    """From a row to a text, a number, numbers, an `Interval` or a `Measured`; to None where it has none."""
    form: str = ""
    """Format specification of numbers; empty for text."""
    wide: bool = False
    """Whether it is in wide tables and CSV only."""
    bare: bool = False
    """Whether people see its values without intervals."""
    difference: Callable[[Row], Interval | None] = nothing
    """From a row to the paired difference to what it is held against: a value is marked if that does not contain zero."""
    better: Literal["lower", "higher"] | None = None
    """Way that is better, if one is."""

    def show(self, row: Row) -> str:
        """Write a cell for people, without its mark."""
        value = self.read(row)
        if value is None:
            return ""
        if isinstance(value, str):
            return one_safe_line(value)
        if hasattr(value, "_fields"):
            return f"{value[0]:{self.form}}" if self.bare else plus_minus(value, self.form)
        return ", ".join(f"{one:{self.form}}" for one in (value if isinstance(value, tuple) else (value,)))

    def mark(self, row: Row) -> str:
        """Return `MARK` where the difference is one by its interval."""
        difference = self.difference(row)
        return "" if difference is None or difference.low <= 0 <= difference.high else MARK

    def style(self, row: Row) -> str:
        """Choose the colour of a marked cell: one for better, one for worse."""
        difference = self.difference(row)
        if difference is None or self.better is None or not self.mark(row):
            return ""
        return "green" if (difference.value < 0) == (self.better == "lower") else "red"

    def fields(self, row: Row) -> Iterator[tuple[str, str | int | float]]:
        """Write a cell for machines: the CSV columns it fills, with all digits."""
        value = self.read(row)
        if hasattr(value, "_fields"):
            yield from ((self.name if part == "value" else f"{self.name}_{part}", n) for part, n in value._asdict().items())
        elif isinstance(value, tuple):
            yield self.name, " ".join(map(repr, value))
        elif value is not None:
            yield self.name, one_safe_line(value) if isinstance(value, str) else value

    def aligned(self, rows: Sequence[Row]) -> list[str]:
        """Write the heading and the cells for people: text to the left, digits below digits, marks hanging over."""
        heading, cells, marks = one_safe_line(self.heading), [self.show(row) for row in rows], [self.mark(row) for row in rows]
        if not self.form:
            return [heading, *cells]
        hang = max(map(len, marks))
        width = max(cell_len(heading), *(cell_len(cell) + hang for cell in cells))
        padded = [" " * (width - hang - cell_len(cell)) + cell + mark for cell, mark in zip(cells, marks, strict=True)]
        return [" " * (width - cell_len(heading)) + heading, *padded]


@dataclass(frozen=True)
class Table(Generic[Row]):
    """Rows, in sections, and the columns that are read off them; the first column names a row."""

    title: str
    columns: Sequence[Column[Row]]
    sections: Sequence[Sequence[Row]]
    about: Mapping[str, str | int] = field(default_factory=dict)
    """CSV columns that say the same of every row."""

    @property
    def rows(self) -> list[Row]:
        """Join the sections."""
        return [row for section in self.sections for row in section]

    def shown(self, wide: bool) -> list[Column[Row]]:
        """Choose columns for people, without those in which no row has a value."""
        rows = self.rows
        return [one for one in self.columns if (wide or not one.wide) and any(one.read(row) is not None for row in rows)]

    def lines(self, wide: bool, width: int | None = None) -> list[tuple[str, ...]]:
        """Write headings, then rows, for people.

        Args:
            wide: whether to write all columns.
            width: characters of a line, which names are shortened for; None if it may take as long as it does.
        """
        names, *others = (column.aligned(self.rows) for column in self.shown(wide))
        most = MAX_WIDE_NAME
        if width is not None:
            most = min(MAX_NAME, max(MIN_NAME, width - sum(GAP + max(map(cell_len, cells)) for cells in others)))
        return list(zip([shortened(name, most) for name in names], *others, strict=True))

    def drawn(self, wide: bool, width: int) -> rich_table.Table:
        """Draw it for a terminal of so many characters a line, without its title."""
        lines = self.lines(wide, None if wide else width)
        if not wide and sum(GAP + max(map(cell_len, cells)) for cells in zip(*lines, strict=True)) - GAP > width:
            # Fold what does not fit into a narrower terminal, at spaces between words: no digit is lost.
            lines = [tuple(map(str.strip, line)) for line in lines]
        headings, *lines = lines
        drawn = rich_table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for heading in headings:
            drawn.add_column(Text(heading), overflow="fold")
        ends = set(accumulate(map(len, self.sections)))
        for number, (row, line) in enumerate(zip(self.rows, lines, strict=True), start=1):
            cells = (Text(cell, one.style(row)) for one, cell in zip(self.shown(wide), line, strict=True))
            drawn.add_row(*cells, end_section=number in ends)
        return drawn

    def markdown(self, wide: bool) -> str:
        """Write it as GitHub's Markdown, below its title."""
        headings, *lines = ([_markdown(cell.strip()) for cell in line] for line in self.lines(wide))
        rule = ["---:" if column.form else ":---" for column in self.shown(wide)]
        return "\n".join(
            [f"**{_markdown(one_safe_line(self.title))}**", "", *(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))]
        )


def _markdown(text: str) -> str:
    """Escape what Markdown or HTML takes for markup."""
    return re.sub(r"([\\`*_<>\[\]|~&])", r"\\\1", text)


def shortened(name: str, most: int) -> str:
    """Leave out the middle of a name of more than so many characters: steerings that are alike differ at either end."""
    if cell_len(name) <= most:
        return name
    tail = (most - 1) // 3
    return f"{set_cell_size(name, most - 1 - tail)}…{set_cell_size(name[::-1], tail)[::-1]}"


def write_csv(file: TextIO, tables: Sequence[Table[Any]]) -> None:
    """Write the rows of all tables below one header; what a table has no column for stays empty."""
    abouts = [table.about for table in tables for _ in table.rows]
    rows = [dict(f for column in table.columns for f in column.fields(row)) for table in tables for row in table.rows]
    header = dict.fromkeys(name for record in (*abouts, *rows) for name in record)
    writer = csv.DictWriter(file, list(header), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**about, **row} for about, row in zip(abouts, rows, strict=True))


class TableConsole(Console):
    """A console that prints `Table` too."""

    def __init__(self, *, wide: bool = False, markdown: bool = False, **how: Any) -> None:
        """
        Args:
            wide: whether tables have all of their columns, in lines as long as it takes.
            markdown: whether to print tables as Markdown; all else then goes to stderr.
            **how: as in `rich.console.Console`.
        """
        # Colour is for differences, not for every number in a sentence.
        super().__init__(stderr=markdown, highlight=False, **how)
        self.wide, self.markdown = wide, markdown

    def table(self, table: Table[Any]) -> None:
        """Print a table."""
        if self.markdown:
            print(table.markdown(self.wide), end="\n\n")
            return
        width, drawn = self.width, table.drawn(self.wide, self.width)
        self.print(Text(one_safe_line(table.title), "bold"))
        if self.wide:
            self.width = max(width, self.measure(drawn, options=self.options.update(width=10_000)).maximum)
        self.print(drawn)
        self.width = width
