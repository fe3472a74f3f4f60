"""Progress bars: a line for each stage on a terminal, and nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tqdm import tqdm

MAX_LABEL = 40
"""Characters of a label: texts are called as their files are."""
TICK_SECONDS = 1.0
"""Time after which a bar is drawn again, with its clock, if nothing has moved it."""

_open: set[tqdm[None]] = set()


@contextmanager
def progress_bar(label: str, total: int | None, unit: str = "tok", *, show: bool) -> Iterator[tqdm[None]]:
    """Show how far a stage has come, on a line that moves every second and stays when the stage is done.

    Nothing is shown where nobody watches: where stderr is no terminal, and no notebook's.

    Args:
        label: name of the stage.
        total: units of work; a stage that ends without an error has done all there was. None if unknown.
        unit: of the work; tokens are counted in thousands.
        show: whether to show anything.

    Yields:
        The bar, whose ``update`` counts units that are done.
    """
    show = show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    shortened = label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
    bar: tqdm[None] = tqdm(desc=shortened, total=total, unit=unit, unit_scale=unit == "tok", dynamic_ncols=True, disable=not show)
    done = Event()

    def tick() -> None:
        while not (done.wait(TICK_SECONDS) or bar.disable):
            bar.refresh()

    ticking = Thread(target=tick, daemon=True)
    if show:
        _open.add(bar)
        ticking.start()
    try:
        yield bar
        if total is not None:
            bar.total = bar.n
    finally:
        done.set()
        if show:
            ticking.join()
        bar.close()
        _open.discard(bar)


def note(message: str) -> None:
    """Write a line to stderr, above the bars that are shown."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def stop() -> None:
    """Leave the bars of stages that something has ended as they are, for other lines to follow."""
    while _open:
        _open.pop().close()
