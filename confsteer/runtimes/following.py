"""The tokens that ``generate()`` has generated before each of its passes, which no pass shows by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from confsteer.errors import SteeringError
from confsteer.runtimes.passes import replaced
from confsteer.runtimes.positions import Marker, Window
from confsteer.steering import Positions


class Following:
    """Marks the positions of each pass of ``generate()`` that a window of generated tokens steers.

    Every row of a batch goes by its own tokens, and so does every beam, wherever it came from.

    Args:
        positions: the window.
        marker: see `confsteer.runtimes.positions.marker_of`.
    """

    def __init__(self, positions: Positions, marker: Marker | None) -> None:
        self._positions, self._marker = positions, marker
        self._prompt: int | None = None
        """Columns of the prompt in the call under way; None until it has begun to generate."""
        self._chunked = 0
        """Columns of the prompt that were read in chunks."""
        self._rows: list[tuple[list[int], Window]] = []
        """Generated tokens that each row had at the last pass, and its window."""
        self._marked: Tensor | None = None
        """Booleans ``[1 or rows, positions]`` of the pass that is prepared."""

    def take(self, hidden_states: Tensor) -> Tensor:
        """Positions to steer in the pass under way, ``[1 or rows, positions]``.

        Args:
            hidden_states: of the pass, ``[rows, positions, d_model]``.

        Raises:
            SteeringError: the pass is not one that ``generate()`` has prepared.
        """
        marked, self._marked = self._marked, None
        rows, positions = hidden_states.shape[:2]
        if marked is None or marked.shape[1] != positions or len(marked) not in (1, rows):
            raise SteeringError(
                f"positions={self._positions} goes by the tokens that generate() generates, and this pass is none that it has "
                'prepared: call generate(), or steer with positions="all" or "generated"'
            )
        return marked

    @contextmanager
    def over(self, model: PreTrainedModel) -> Iterator[None]:
        """Follow the calls of ``model.generate`` within the context."""
        whole: Any = model
        generate, prepare = whole.generate, whole.prepare_inputs_for_generation
        prepare_length = whole._prepare_generated_length

        @functools.wraps(generate)
        def followed(*args: Any, **kwargs: Any) -> Any:
            # An assistant may be the same model, and is called within the call that it assists.
            before = self._prompt, self._chunked, self._rows
            self._prompt = None
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt, self._chunked, self._rows = before
                self._marked = None

        @functools.wraps(prepare_length)
        def measured(*args: Any, input_ids_length: int, **kwargs: Any) -> Any:
            # A model's own generate() may begin transformers' with other ids than it was given, or with embeddings.
            self._prompt, self._chunked, self._rows = input_ids_length, 0, []
            return prepare_length(*args, input_ids_length=input_ids_length, **kwargs)

        @functools.wraps(prepare)
        def prepared(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            model_inputs = prepare(input_ids, *args, **kwargs)
            given = model_inputs.get("input_ids")
            given = model_inputs.get("inputs_embeds") if given is None else given
            if self._prompt is not None and given is not None:
                self._marked = self._mark(input_ids, given.shape[1], self._prompt)
            return model_inputs

        with (
            replaced(model, "generate", followed),
            replaced(model, "_prepare_generated_length", measured),
            replaced(model, "prepare_inputs_for_generation", prepared),
        ):
            yield

    def _mark(self, ids: Tensor, length: int, prompt: int) -> Tensor:
        """Mark the last positions of texts ``[rows, columns]``: as many as the pass has."""
        end = ids.shape[1]
        if end < prompt:
            self._chunked += end
            end = self._chunked
        # Each position chooses the token of the next column.
        number = torch.arange(end - length, end, device=ids.device) + 1 - prompt
        if self._marker is None:
            spans = [Window(self._positions, None).span]
        else:
            spans = [self._span(row, tokens) for row, tokens in enumerate(ids[:, prompt:].tolist())]
        first, last = torch.tensor(spans, device=ids.device).T[..., None]
        marked: Tensor = (number >= first) & (number < last)
        return marked

    def _span(self, row: int, tokens: list[int]) -> tuple[float, float]:
        if row == len(self._rows):
            self._rows.append(([], Window(self._positions, self._marker)))
        known, window = self._rows[row]
        # Beams change places, and drafts are given up: only what a row goes on from is known of it.
        if tokens[: len(known)] != known:
            known, window = [], Window(self._positions, self._marker)
        window.read(tokens[len(known) :], at=len(known))
        self._rows[row] = tokens, window
        return window.span
