from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confsteer.runtimes.vllm.worker.slots import NEUTRAL, Slots, token_rows

CAPACITY = 3
BATCHES = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=CAPACITY), max_size=20)


@given(BATCHES)
def test_a_row_holds_what_was_last_written_to_it_for_every_steering_of_a_batch(batches: list[list[str]]) -> None:
    slots, written = Slots(CAPACITY), dict[int, str]()
    for batch in batches:
        for steering, row in slots.assign(batch).items():
            assert 1 <= row <= CAPACITY
            written[row] = steering
        for steering in batch:
            assert written[slots[steering]] == steering


@given(BATCHES)
def test_only_what_is_not_there_is_written_and_the_longest_unused_makes_room(batches: list[list[str]]) -> None:
    slots, recent = Slots(CAPACITY), list[str]()
    for batch in batches:
        wanted = list(dict.fromkeys(batch))
        assert set(slots.assign(batch)) == set(wanted) - set(recent)
        kept = [steering for steering in recent if steering not in wanted]
        new = [steering for steering in wanted if steering not in recent]
        # Those that were there are used before those that come in.
        recent = [*kept, *(steering for steering in wanted if steering not in new), *new][-CAPACITY:]


def test_more_steerings_than_rows_in_one_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 steerings in a batch, and 3 rows"):
        Slots(CAPACITY).assign("abcd")


BEGIN, END = (st.integers(0, 12) | st.sampled_from([-np.inf, np.inf]) for _ in range(2))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 9), BEGIN, END), min_size=1, max_size=8))
def test_each_token_follows_its_request_within_its_span(requests: list[tuple[int, int, int, float, float]]) -> None:
    rows, counts, computed, begin, end = zip(*requests, strict=True)
    expected = [
        row if first <= position < last else NEUTRAL
        for row, count, done, first, last in requests
        for position in range(done, done + count)
    ]
    spans = list(zip(begin, end, strict=True))
    assert token_rows(rows, np.array(counts), np.array(computed), spans).tolist() == expected
