"""Response curves: what the output does as a group of neurons is pushed together.

A dial at position ``s`` adds ``s · sign_i · std_i`` to the activation of each of its neurons, so the residual moves by
``s · D`` with one direction ``D = Σ sign_i std_i w_i``, and the logits have the closed form

    z'(s) = (σ/σ'(s)) (z − b) + (s/σ'(s)) W_U D + b
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.frequency import Unigram
from confsteer.discovery.readout import Readout

POINTS_PER_SIDE = 12
LARGEST_POSITION = 64.0
WIDEST_CHANGE = 1.5
"""A curve ends where the dial has moved by this many nats (or turns back)."""


class ResponseMeans(NamedTuple):
    """Means over tokens at each dial position, float64 ``[positions]``, in nats."""

    position: Tensor
    entropy: Tensor
    kl_model_unigram: Tensor
    """``KL(P_model ‖ P_freq)``"""
    kl_unigram_model: Tensor
    """``KL(P_freq ‖ P_model)``"""
    loss: Tensor
    argmax_changed: Tensor
    """Share of tokens whose most likely next token differs from that at position 0."""


class ResponseCurve:
    """Accumulates `ResponseMeans` over a stream of tokens."""

    def __init__(self, readout: Readout, direction: Tensor, unigram: Unigram, positions: Tensor) -> None:
        """
        Args:
            readout: the model's last layer.
            direction: ``D``, ``[d_model]``, centred if the norm centres.
            unigram: the corpus's unigram distribution.
            positions: dial positions, ``[positions]``.
        """
        self.readout, self.direction, self.unigram = readout, direction, unigram
        self.positions = positions.double()
        self._sums = torch.zeros(5, len(positions), dtype=torch.float64)
        self._count = 0

    def update(self, residual: Tensor, targets: Tensor) -> None:
        """Add tokens: ``[tokens, d_model]`` and the ids of the tokens that follow, ``[tokens]``."""
        for rows in torch.arange(len(residual)).split(max(1, 2**24 // self.readout.vocab_size)):
            self._update(residual[rows], targets[rows])

    def _update(self, residual: Tensor, targets: Tensor) -> None:
        readout, direction = self.readout, self.direction
        residual = readout.centre(residual)
        sigma = readout.norm_scale(residual)
        x = (residual / sigma[:, None]) @ readout.unembedding.T
        u = readout.unembedding @ direction
        frequency = self.unigram.log_frequency.exp()
        frequency_entropy = -float(frequency @ self.unigram.log_frequency)
        argmax = (x + readout.logit_bias).argmax(dim=-1)
        for column, position in enumerate(self.positions.tolist()):
            new_sigma = readout.norm_scale(residual + position * direction)
            logits = x * (sigma / new_sigma)[:, None] + readout.logit_bias
            logits += (position / new_sigma)[:, None] * u
            log_p = torch.log_softmax(logits, dim=-1)
            p = log_p.exp()
            entropy = -(p * log_p).sum(dim=-1)
            kl_model_unigram = -entropy - p @ self.unigram.log_frequency
            kl_unigram_model = -frequency_entropy - log_p @ frequency
            loss = -log_p.gather(1, targets[:, None])
            changed = (logits.argmax(dim=-1) != argmax).double()
            for row, values in enumerate((entropy, kl_model_unigram, kl_unigram_model, loss, changed)):
                self._sums[row, column] += float(values.double().sum())
        self._count += len(residual)

    def result(self) -> ResponseMeans:
        """Means over all tokens so far."""
        return ResponseMeans(self.positions, *(self._sums / self._count))


def choose_positions(readout: Readout, direction: Tensor, unigram: Unigram, residual: Tensor, *, dial: str) -> Tensor:
    """Dial positions worth measuring, ascending, with 0 among them; found on a sample of tokens.

    On each side positions are doubled until the dial's quantity has moved by `WIDEST_CHANGE` nats, turns back, or the
    position reaches `LARGEST_POSITION`. Points are denser near zero.

    Args:
        readout: the model's last layer.
        direction: ``D``, ``[d_model]``.
        unigram: the corpus's unigram distribution.
        residual: a sample, ``[tokens, d_model]``.
        dial: ``"entropy"`` or ``"unigram"``.
    """
    doublings = [0.25 * 2**i for i in range(9)]
    trial = torch.tensor([0.0, *doublings, *(-d for d in doublings)])
    curve = ResponseCurve(readout, direction, unigram, trial)
    curve.update(residual, residual.new_zeros(len(residual), dtype=torch.long))
    moved = dial_change(curve.result(), dial)
    fractions = (torch.arange(1, POINTS_PER_SIDE + 1, dtype=torch.float64) / POINTS_PER_SIDE) ** 1.5
    sides = []
    for sign, start in ((1, 1), (-1, 1 + len(doublings))):
        end, previous = doublings[0], 0.0
        for position, change in zip(doublings, moved[start : start + len(doublings)].tolist(), strict=True):
            end = position
            if abs(change) >= WIDEST_CHANGE or sign * change <= sign * previous:
                break
            previous = change
        sides.append(sign * end * fractions)
    return torch.cat([sides[1].flip(0), torch.zeros(1, dtype=torch.float64), sides[0]])


def dial_change(means: ResponseMeans, dial: str) -> Tensor:
    """What each position does in the dial's own units, relative to position 0, ``[positions]``.

    ``"entropy"``: change of the mean entropy. ``"unigram"``: how much closer ``KL(P_model ‖ P_freq)`` has come.
    """
    values = means.entropy if dial == "entropy" else -means.kl_model_unigram
    return values - values[means.position.abs().argmin()]


def monotone_range(change: Sequence[float], start: int) -> tuple[int, int]:
    """First and last index of the stretch around `start` over which `change` rises strictly.

    A dial is only turned where more of it means more of its effect.
    """
    low = high = start
    while low > 0 and change[low - 1] < change[low]:
        low -= 1
    while high + 1 < len(change) and change[high + 1] > change[high]:
        high += 1
    return low, high
