"""Windows of generated tokens whose choice is steered: the same in every engine, by the tokens alone.

A token is chosen by the pass over the position before it. So generated token number k, the first being 0, is chosen at position
``prompt + k − 1``. Tokens of the prompt have numbers below 0, and are chosen nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from confsteer.errors import SteeringError
from confsteer.steering import After, First, Positions
from confsteer.text.spelling import Spelling


class Marker:
    """A sequence to look for in what tokens spell: token by token, by the automaton of Knuth, Morris and Pratt (1977).

    Args:
        sequence: bytes of a text, or token ids.
        spelled: bytes of a token, or the token id itself.
    """

    def __init__(self, sequence: Sequence[int], spelled: Callable[[int], Sequence[int]]) -> None:
        self._sequence, self._spelled = sequence, spelled
        self.found = len(sequence)
        """The state once it has been there, which stays."""
        # The longest proper prefix of the sequence that ends each of its prefixes.
        self._shorter = [0] * (len(sequence) + 1)
        for end in range(2, len(sequence) + 1):
            self._shorter[end] = self._next(self._shorter[end - 1], sequence[end - 1])

    def _next(self, state: int, symbol: int) -> int:
        while state and self._sequence[state] != symbol:
            state = self._shorter[state]
        return state + 1 if self._sequence[state] == symbol else 0

    def step(self, state: int, token: int) -> int:
        """The state after a token: how much of the sequence ends the text. 0 before the first token."""
        for symbol in self._spelled(token):
            if state == self.found:
                break
            state = self._next(state, symbol)
        return state


def marker_of(positions: Positions, spelling_of: Callable[[], Spelling | None]) -> Marker | None:
    """Make the marker that steering begins after; None if it begins after nothing.

    Args:
        positions: of a steering.
        spelling_of: gives that of the model's tokenizer, which a text takes; None where there is none.

    Raises:
        SteeringError: there is no tokenizer, or its tokens do not spell the text.
    """
    if not isinstance(positions, After):
        return None
    if not isinstance(positions.after, str):
        return Marker(positions.after, lambda token: (token,))
    spelling = spelling_of()
    if spelling is None:
        raise SteeringError(
            f"positions={positions}: to find a text takes the model's tokenizer, and there is none here. Give it to "
            "confsteer.steer (tokenizer=...), leave out vLLM's --skip-tokenizer-init, or give token ids: "
            '{"after": [ID, ...]}'
        )
    marker = Marker(positions.after.encode(), spelling.bytes_of)
    window = Window(positions, marker)
    window.read(spelling.encode(positions.after), at=0)
    if window.span[0] == math.inf:
        spelled = b"".join(map(spelling.bytes_of, spelling.encode(positions.after))).decode(errors="replace")
        raise SteeringError(
            f"positions={positions}: the model's tokens for that spell {spelled!r}: give that, or token "
            'ids, {"after": [ID, ...]}'
        )
    return marker


class Window:
    """Numbers of the generated tokens of one text whose choice is steered, as far as its tokens are known.

    Args:
        positions: of the steering.
        marker: what `marker_of` gives for them.
    """

    def __init__(self, positions: Positions, marker: Marker | None) -> None:
        self._marker = marker
        self.span: tuple[float, float] = (-math.inf, math.inf)
        """First number, and the one after the last. Beyond the tokens that are known, a marker may still come."""
        self.settled = marker is None
        """Whether no token that is read will change the span."""
        if marker is not None:
            self.span = math.inf, math.inf
        elif isinstance(positions, First):
            self.span = 0, positions.first
        elif positions == "generated":
            self.span = 0, math.inf
        self._states = [0]
        """States of the marker after 0, 1, 2, … tokens. Beyond those of the last reading they may be of drafts."""

    def read(self, tokens: Sequence[int], at: int) -> None:
        """Learn of the tokens from number `at` on. They take the place of those that were read there before, as of drafts.

        Raises:
            ValueError: tokens before them have never been read.
        """
        if self.settled:
            return
        assert self._marker is not None
        begin = self.span[0]
        if begin <= at:
            self.settled = True  # by tokens that stand
            return
        if at >= len(self._states):
            raise ValueError(f"generated token {at} is read, and only {len(self._states) - 1} before it are known")
        if begin <= at + len(tokens):
            begin = math.inf
        for number, token in enumerate(tokens, start=at + 1):
            state = self._marker.step(self._states[number - 1], token)
            self._states[number : number + 1] = [state]
            if state == self._marker.found:
                begin = min(begin, number)
        self.span = begin, math.inf

    def steers(self, number: int) -> bool:
        """Whether the choice of a generated token is steered; all before it have been read."""
        return self.span[0] <= number < self.span[1]
