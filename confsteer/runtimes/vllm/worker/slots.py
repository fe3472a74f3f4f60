"""Rows of the table, and the steering in each. Rows belong to steerings, not to requests. So requests that are preempted,
aborted or forgotten leave nothing to clean up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NEUTRAL = 0
"""Number of the row that changes nothing."""


class Slots:
    """Rows 1 to `capacity`. The least recently used one is replaced first.

    A batch of at most `capacity` requests always fits, whatever else was in use before.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._row_of: OrderedDict[str, int] = OrderedDict()

    def assign(self, steerings: Iterable[str]) -> dict[str, int]:
        """Give each of a batch's steerings a row. Return those that were not in the table, with their new rows.

        Raises:
            ValueError: there are more different steerings than rows.
        """
        wanted = dict.fromkeys(steerings)
        if len(wanted) > self.capacity:
            raise ValueError(f"{len(wanted)} steerings in a batch, and {self.capacity} rows")
        for steering in wanted:
            if steering in self._row_of:
                self._row_of.move_to_end(steering)
        new = {}
        for steering in wanted:
            if steering not in self._row_of:
                # Evict the least recently used row. Rows this batch needs were just moved to the end.
                free = len(self._row_of) + 1 if len(self._row_of) < self.capacity else self._row_of.popitem(last=False)[1]
                self._row_of[steering] = new[steering] = free
        return new

    def __getitem__(self, steering: str) -> int:
        return self._row_of[steering]


def token_rows(
    rows: Sequence[int], counts: NDArray[np.integer], computed: NDArray[np.integer], spans: Sequence[tuple[float, float]]
) -> NDArray[np.int64]:
    """Find the row of each token of a batch in which the requests' tokens follow each other.

    Args:
        rows: row of each request.
        counts: tokens of each request in this step.
        computed: tokens of each request before this step.
        spans: position of each request at which its steering begins, and the one at which it has ended.
    """
    tokens = np.repeat(np.asarray(rows, dtype=np.int64), counts)
    starts = np.cumsum(counts) - counts
    position = np.arange(len(tokens)) - np.repeat(starts - computed, counts)
    begin, end = np.repeat(np.asarray(spans, dtype=np.float64), counts, axis=0).T
    tokens[(position < begin) | (position >= end)] = NEUTRAL
    return tokens
