"""Effects of chosen pairs of a token and a neuron, whose ``Δ`` is too large for the expansion in `effects`.

**Sums over the vocabulary by equal masses.** A vocabulary has a quarter of a million tokens, most of them far down in the tail.
Each token with a probability of ``1/M`` or more stands for itself. The others are walked through in the order of their ids, and
one in each ``ε/S`` of probability stands for that much: ``ε`` is their mass and ``S = ⌈εM⌉``. At most ``M`` tokens, and no
random number.

**Only the remainder is summed so.** All that is first or second order in ``Δ`` is known over the whole vocabulary from
`confsteer.discovery.moments`. With ``r(Δ) = e^Δ − 1 − Δ − Δ²/2`` and ``Δ`` centred under ``p``

    E_p[e^Δ] − 1 = ½ κ(Δ,Δ) + Σ p r(Δ)

so that the points carry what is third order and above. ``tests/discovery/test_pairs.py`` holds the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.exact import TokenEffects
from confsteer.discovery.moments import Moments, Tokens
from confsteer.discovery.second_order import AtTarget, SecondOrder
from confsteer.last_layer.readout import WORKING_SET, Move, Readout
from confsteer.last_layer.unigram import Unigram

POINTS = 2048
"""``M``: at most so many tokens of the vocabulary stand for all."""
LARGE, POINTS_IF_LARGE = 0.25, 2**15
"""Where a pair's ``Var_p[Δ]`` is above this (in nats²), ``e^Δ`` makes more of the tail, and more points stand for it."""


class Points(NamedTuple):
    """Tokens of the vocabulary that stand for all of it."""

    ids: Tensor
    """``[points]``"""
    weight: Tensor
    """Probability that each stands for, ``[points]``."""
    alone: Tensor
    """Whether each stands for itself only, bool ``[points]``."""

    @classmethod
    def of(cls, p: Tensor, most: int) -> Points:
        """The points of a distribution ``[vocab]``, at most `most` and a few for rounding."""
        if len(p) <= most:
            return cls(torch.arange(len(p), device=p.device), p, torch.ones_like(p, dtype=torch.bool))
        large = p >= 1 / most
        ids, tail = large.nonzero()[:, 0], p.masked_fill(large, 0).double().cumsum(dim=0)
        mass = tail[-1]
        n = int((mass * most).ceil().clamp_min(1))
        at = (torch.arange(n, device=p.device) + 0.5) * (mass / n)
        sampled = torch.searchsorted(tail, at).clamp_max(len(p) - 1)
        weight = torch.cat([p[ids], (mass / n).to(p).expand(n)])
        alone = torch.arange(len(weight), device=p.device) < len(ids)
        return cls(torch.cat([ids, sampled]), weight, alone)


class _Pairs(NamedTuple):
    """Pairs, and all that is known of them before anything is summed: ``[…, pairs]``."""

    token: Tensor
    neuron: Tensor
    moves: Move
    second: SecondOrder
    mean_u: Tensor
    mean_v: Tensor
    beyond_at_target: Tensor
    """Part of each move at the target that a softcap makes, beyond first order."""

    def at(self, here: slice) -> _Pairs:
        return _Pairs(
            self.token[here],
            self.neuron[here],
            self.moves.at(slice(None), here),
            self.second.at(here),
            self.mean_u[here],
            self.mean_v[here],
            self.beyond_at_target[:, here],
        )


def evaluate_pairs(
    readout: Readout,
    tokens: Tokens,
    moments: Moments,
    delta: Tensor,
    unigram: Unigram,
    pairs: Tensor,
    effects: TokenEffects,
) -> None:
    """Overwrite the `effects` of `pairs` ``[pairs, 2]`` of a token and a neuron, in the order of the tokens."""
    known = _know(readout, tokens, moments, delta, unigram, pairs)
    present, counts = known.token.unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(dim=0).tolist()]
    largest = torch.segment_reduce(known.second.largest_variance, "max", lengths=counts)
    most = torch.where(largest > LARGE, POINTS_IF_LARGE, POINTS).tolist()
    sums = torch.empty(2 * len(known.moves.write) + 2, len(pairs), device=delta.device)
    at_once = max(1, WORKING_SET // readout.vocab_size)
    for start in range(0, len(present), at_once):
        block = present[start : start + at_once]
        y = tokens.directions[-1, block] @ readout.unembedding.T + readout.logit_bias
        p = (readout.cap(y) - tokens.log_z[block]).exp()
        for row in range(start, start + len(block)):
            here = slice(ends[row], ends[row + 1])
            points = Points.of(p[row - start], most[row])
            sums[:, here] = _remainders(readout, tokens, unigram, points, known.at(here))
    for approximate, values in zip(effects, _with_remainders(known, sums), strict=True):
        approximate[known.token, known.neuron] = values


def _know(readout: Readout, tokens: Tokens, moments: Moments, delta: Tensor, unigram: Unigram, pairs: Tensor) -> _Pairs:
    t, i = (column.contiguous() for column in pairs.unbind(dim=1))
    moves = readout.move(tokens.state, delta).at(slice(None), t, i)
    m, mean_x, targets = moments.of_pairs(t, i), tokens.mean_x[:, t, 0], tokens.targets[t]
    rows = readout.unembedding[tokens.targets]
    u, bias = (rows[t] * readout.w_out[i]).sum(dim=-1), readout.logit_bias[targets]
    y = (tokens.directions * rows).sum(dim=-1)[:, t]
    target = AtTarget.of(readout, bias, u=u, x=y, v=unigram.direction[targets])
    beyond = torch.zeros_like(moves.write)
    if readout.softcap is not None:
        z = y[-1] + bias
        beyond = readout.cap(z + moves.linear(y, u)) - readout.cap(z) - moves.linear(target.x, target.u)
    return _Pairs(t, i, moves, SecondOrder.of(m, mean_x, target, moves), m.mean_u, m.mean_v, beyond)


def _remainders(readout: Readout, tokens: Tokens, unigram: Unigram, points: Points, pairs: _Pairs) -> Tensor:
    """Sum what the pairs of one token are beyond second order.

    Returns:
        ``Σ p r`` of each move; ``Σ p e^Δ (l + Δ)`` of each; ``Σ p r`` of the whole move held along ``v``; and that move under the
        unigram distribution, which a softcap alone has and which is summed over the points that stand alone: ``[…, pairs]``.
    """
    token, W, w = pairs.token[0], readout.unembedding[points.ids], points.weight
    y, u = tokens.directions[:, token] @ W.T, readout.w_out[pairs.neuron] @ W.T
    z = y[-1] + readout.logit_bias[points.ids]
    capped = readout.cap(z)
    log_p = capped - tokens.log_z[token] - tokens.mean_log_p[token]  # centred
    # Δ and its first order, centred: [moves, pairs, points].
    moves = pairs.moves.at(..., None)
    centre = moves.linear(tokens.mean_x[:, token, :, None], pairs.mean_u[:, None])
    first = moves.linear(y[:, None], u)
    if readout.softcap is None:
        delta = first = first.sub_(centre)
    else:
        delta = readout.cap(z + first) - capped - centre
        first = readout.cap_slope(capped) * first - centre
    second = first + 0.5 * first.square()
    growth = delta.expm1()
    with_l = growth * (log_p + delta) + (delta - first) - log_p * second - first.square()
    along_v = pairs.second.along_v[:, None] * (unigram.direction[points.ids] - pairs.mean_v[:, None])
    held = first[0] - along_v
    held_remainder = (delta[0] - along_v).expm1() - held - 0.5 * held.square()
    frequency = (delta[0] - first[0]) @ torch.where(points.alone, unigram.frequency[points.ids], 0)
    return torch.cat([(growth - second) @ w, with_l @ w, (held_remainder @ w)[None], frequency[None]])


def _with_remainders(pairs: _Pairs, sums: Tensor) -> TokenEffects:
    """Effects from the two orders that are known and the sums of what is beyond them."""
    second, n_moves = pairs.second, len(pairs.moves.write)
    remainder, with_l, (held, frequency) = sums.split([n_moves, n_moves, 2])
    growth = 0.5 * second.variance + remainder
    of_p = second.with_l + 0.5 * second.with_l_squared + second.variance + with_l
    log_mean, beyond = growth.log1p(), pairs.beyond_at_target
    return TokenEffects.of_moves(
        loss=log_mean - second.at_target - beyond,
        entropy=log_mean - of_p / (1 + growth),
        frequency_kl=log_mean[0] - second.under_frequency - frequency,
        loss_without_frequency=(0.5 * second.held_variance + held).log1p() - second.held_at_target - beyond[0],
    )
