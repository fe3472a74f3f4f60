from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confsteer import SteeringError, demo
from confsteer.runtimes.positions import Marker, Window, marker_of
from confsteer.steering import After, First
from confsteer.text.spelling import Spelling
from tests.models import tiny_tokenizer

SPELLED = ["a", "b", "ab", "aa", "ba", "bab", "", "abab"]
"""Text of each token of a small vocabulary: the same text in many tokens, and markers that end within one."""
TOKENS = st.lists(st.integers(0, len(SPELLED) - 1), max_size=12)


def text_marker(text: str) -> tuple[Any, Marker]:
    return After(after=text), Marker(text.encode(), lambda token: SPELLED[token].encode())


def naive(marker: str | list[int], tokens: list[int]) -> float:
    """Number of the first tokens that have the marker in them, by looking at all beginnings."""
    for count in range(len(tokens) + 1):
        if isinstance(marker, str):
            found = marker in "".join(SPELLED[token] for token in tokens[:count])
        else:
            found = any(tokens[i : i + len(marker)] == marker for i in range(count + 1 - len(marker)))
        if found:
            return count
    return math.inf


markers = st.text("ab", min_size=1, max_size=6) | st.lists(st.integers(0, len(SPELLED) - 1), min_size=1, max_size=4)


def window_of(marker: str | list[int]) -> Window:
    if isinstance(marker, str):
        return Window(*text_marker(marker))
    positions = After(after=tuple(marker))
    return Window(positions, marker_of(positions, lambda: None))


@given(marker=markers, tokens=TOKENS, cuts=st.lists(st.integers(0, 12)))
def test_a_window_begins_after_the_first_tokens_that_have_the_marker(
    marker: str | list[int], tokens: list[int], cuts: list[int]
) -> None:
    """However they are read."""
    window, ends = window_of(marker), [*sorted({cut for cut in cuts if cut < len(tokens)}), len(tokens)]
    for begin, end in zip([0, *ends], ends, strict=False):
        window.read(tokens[begin:end], at=begin)
    expected = naive(marker, tokens)
    assert window.span == (expected, math.inf)
    assert [window.steers(number) for number in range(len(tokens) + 1)] == [
        naive(marker, tokens[:number]) <= number for number in range(len(tokens) + 1)
    ]


@given(marker=markers, steps=st.lists(st.tuples(TOKENS, st.integers(0, 12)), max_size=6), data=st.data())
def test_drafts_that_are_given_up_and_tokens_that_are_read_again_leave_nothing_behind(
    marker: str | list[int], steps: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    """As an engine does: a token that stands and drafts are read, and some of the drafts stand."""
    window, text, unread = window_of(marker), list[int](), 0

    def draw(low: int, high: int) -> int:
        found: int = data.draw(st.integers(low, high))
        return found

    for drafts, accepted in steps:
        # After a preemption what stands is read once more, from anywhere that was read before, to anywhere.
        if draw(0, 1):
            start = draw(0, unread)
            window.read(text[start : draw(start, unread)], at=start)
        text.append(draw(0, len(SPELLED) - 1))
        tokens = [*text[unread:], *drafts]
        window.read(tokens, at=unread)
        expected = naive(marker, [*text[:unread], *tokens])
        for number in range(unread + 1, unread + len(tokens) + 1):
            assert window.steers(number) == (expected <= number)
        text = [*text, *drafts[:accepted]]
        unread = len(text)
        if window.settled:
            assert window.span[0] == naive(marker, text)


@given(count=st.integers(1, 9), number=st.integers(-5, 12))
def test_windows_without_a_marker(count: int, number: int) -> None:
    windows = {positions: Window(positions, None) for positions in ("all", "generated", First(first=count))}
    assert [window.steers(number) for window in windows.values()] == [True, number >= 0, 0 <= number < count]
    assert all(window.settled for window in windows.values())


def test_tokens_that_were_never_read_are_missed() -> None:
    window = window_of("ab")
    window.read([0], at=0)
    with pytest.raises(ValueError, match="generated token 3 is read, and only 1 before it"):
        window.read([1], at=3)


def test_a_text_takes_a_tokenizer_that_can_spell_it() -> None:
    tokenizer = demo.load().tokenizer
    for text in ("</think>", "答案", "\n\n", "Answer: "):
        positions = After(after=text)
        window = Window(positions, marker_of(positions, lambda: Spelling(tokenizer)))
        ids = tokenizer.encode(f"it{text}")
        window.read(ids, at=0)
        assert window.span[0] == len(ids)
    with pytest.raises(SteeringError, match=r"positions=after:</think>: to find a text takes the model's tokenizer"):
        marker_of(After(after="</think>"), lambda: None)
    with pytest.raises(SteeringError, match=r"the model's tokens for that spell ' <eos>': give that"):
        marker_of(After(after="</think>"), lambda: Spelling(tiny_tokenizer()))
