"""An entropy neuron made by hand: a constant along the direction of the residual that the unembedding reads least.

Entropy neurons write into the null space and make the residual longer or shorter. The final norm does the rest. A constant in
the null space does the same. It is added right before the final norm, and after a norm on the MLP's output. So it is the same on
every token.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.response import ResponseCurve, dial_change
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

PUSH = 1 / 16
"""Length of the vector that position 1 of the dial adds, as a share of the residual's mean length."""
STEP = 0.25
"""Dial position, on each side of 0, at which the direction of rising entropy is found."""


class NullDirection(NamedTuple):
    """The direction, and the residual's measures along it on a text."""

    vector: Tensor
    """Unit vector, float32 ``[d_model]``; the entropy rises along it."""
    singular_value: float
    """Singular value of the folded unembedding that it belongs to."""
    residual_norm: float
    """Mean length of the residual that the final norm sees."""
    residual_along: float
    """Mean component of the residual along it."""

    @property
    def push(self) -> float:
        """Length of the vector that position 1 of the dial adds."""
        return PUSH * self.residual_norm


def written_before_norm(readout: Readout, vector: Tensor) -> Readout:
    """The readout of an imaginary neuron that writes ``vector`` ``[d_model]`` right before the final norm."""
    return dataclasses.replace(readout, w_out=vector[None], write_norm=None)


def measure_along(readout: Readout, vector: Tensor, states: TokenStates, unigram: Unigram) -> Tensor:
    """Measure the residual along a direction, and which way along it the entropy rises.

    Args:
        readout: the model's last layer.
        vector: the direction, of length 1, ``[d_model]``.
        states: a sample of tokens.
        unigram: the corpus's unigram distribution.

    Returns:
        The sign with which the entropy rises, the residual's mean length, and its mean component along the direction, float64
        ``[3]``.
    """
    residual = readout.centre(states.residual)
    norm, along = residual.norm(dim=1).double().mean(), (residual @ vector).double().mean()
    push = (PUSH * norm).float()[None]
    curve = ResponseCurve(written_before_norm(readout, vector), push, unigram, torch.tensor([-STEP, 0.0, STEP]))
    for outputs, _ in FullOutputs.stream(readout, states):
        curve.update(outputs)
    lower, _, higher = dial_change(curve.result(), "entropy").tolist()
    return torch.tensor([1.0 if higher >= lower else -1.0, float(norm), float(along)], dtype=torch.float64)
