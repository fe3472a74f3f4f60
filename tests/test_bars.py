"""Progress bars leave a line for each stage, and other lines in one piece."""

from __future__ import annotations

import io
import time
from collections.abc import Generator
from contextlib import redirect_stderr

import pytest

from confsteer import bars


class Terminal(io.StringIO):
    """A stderr that somebody watches."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Read what stands on the screen: what comes after a carriage return is written over what was there."""
        shown = []
        for line in self.getvalue().split("\n"):
            letters: list[str] = []
            for part in line.split("\r"):
                letters[: len(part)] = part
            shown.append("".join(letters).rstrip())
        return [line for line in shown if line]


def test_a_stage_is_a_line_that_ends_whole() -> None:
    """Also one that needs less than it might have, or bears a long name."""
    terminal = Terminal()
    for label, done in (("first", 10), ("second " * 20, 3)):
        with redirect_stderr(terminal), bars.progress_bar(label, 10, "step", show=True) as bar:
            for _ in range(done):
                bar.update()
    first, second = terminal.lines()
    assert first.startswith("first: 100%")
    assert second.partition(":")[0] == ("second " * 20)[: bars.MAX_LABEL - 1] + "…"
    assert "100%" in second
    assert "3/3" in second


def test_nothing_is_shown_where_nobody_watches() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    with redirect_stderr(terminal), bars.progress_bar("not asked for", 10, show=False) as bar:
        bar.update()
    assert terminal.getvalue() == ""
    with redirect_stderr(pipe), bars.progress_bar("piped", 10, show=True) as bar:
        bar.update()
    assert pipe.getvalue() == ""


def test_a_warning_is_a_line_above_the_bar() -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), bars.progress_bar("stage", 2, show=True) as bar:
        bar.update()
        bars.note("Warning: this")
        bar.update()
    warning, stage = terminal.lines()
    assert warning == "Warning: this"
    assert stage.startswith("stage: 100%")


def test_a_bar_moves_while_the_work_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(bars, "TICK_SECONDS", 0.001)
    with redirect_stderr(terminal), bars.progress_bar("stage", 2, show=True):
        before = terminal.getvalue()
        for _ in range(10_000):
            if terminal.getvalue() != before:
                break
            time.sleep(0.001)
        assert terminal.getvalue() != before


def test_a_stage_that_an_error_ends_stays_where_it_was() -> None:
    """Also if the bar is in a generator, which the error does not go through."""
    terminal = Terminal()

    def work() -> Generator[int]:
        with bars.progress_bar("stage", 4, show=True) as bar:
            for i in range(4):
                bar.update()
                yield i

    with redirect_stderr(terminal):
        working = work()
        assert next(working) == 0
        bars.stop()
        print("Error: that", file=terminal)
        working.close()
    stage, error = terminal.lines()
    assert stage.startswith("stage:  25%")
    assert error == "Error: that"
