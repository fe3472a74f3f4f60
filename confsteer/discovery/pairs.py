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
from confsteer.last_layer.states import rows_of
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
    """Pairs, and all that is known of them before anything is summed, ``[pairs]``."""

    token: Tensor
    neuron: Tensor
    total: Move
    direct: Move
    second: SecondOrder
    mean_u: Tensor
    mean_v: Tensor
    beyond_at_target: Tensor
    """Part of the whole move at the target that a softcap makes, beyond first order."""
    direct_beyond_at_target: Tensor
    """The same of the direct move."""


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
    largest = torch.segment_reduce(known.second.variance, "max", lengths=counts)
    most = torch.where(largest > LARGE, POINTS_IF_LARGE, POINTS).tolist()
    sums = torch.empty(5, len(pairs), device=delta.device)
    at_once = max(1, WORKING_SET // readout.vocab_size)
    for start in range(0, len(present), at_once):
        block = present[start : start + at_once]
        y = tokens.directions[-1, block] @ readout.unembedding.T + readout.logit_bias
        p = (readout.cap(y) - tokens.log_z[block]).exp()
        for row, token in enumerate(block.tolist(), start):
            here = slice(ends[row], ends[row + 1])
            points = Points.of(p[row - start], most[row])
            sums[:, here] = _remainders(readout, tokens, unigram, token, points, _at(known, here))
    for approximate, values in zip(effects, _with_remainders(known, *sums), strict=True):
        approximate[known.token, known.neuron] = values


def _know(readout: Readout, tokens: Tokens, moments: Moments, delta: Tensor, unigram: Unigram, pairs: Tensor) -> _Pairs:
    t, i = (column.contiguous() for column in pairs.unbind(dim=1))
    total, direct = (Move(tuple(c[t, i] for c in move.along), move.write[t, i]) for move in readout.move(tokens.state, delta))
    m, mean_x, targets = moments.of_pairs(t, i), tokens.mean_x[:, t, 0], tokens.targets[t]
    rows = readout.unembedding[tokens.targets]
    u = (rows[t] * readout.w_out[i]).sum(dim=-1)
    y = (tokens.directions * rows).sum(dim=-1)[:, t]
    v = unigram.direction[targets]
    if readout.softcap is None:
        beyond, direct_beyond = torch.zeros_like(u), torch.zeros_like(u)
        target = AtTarget(u, y, v)
    else:
        z = y[-1] + readout.logit_bias[targets]
        s = readout.cap_slope(readout.cap(z))
        target = AtTarget(s * u, s * y, v)
        beyond, direct_beyond = (
            readout.cap(z + move.linear(y, u)) - readout.cap(z) - s * move.linear(y, u) for move in (total, direct)
        )
    second = SecondOrder.of(m, mean_x, target, total, direct)
    return _Pairs(t, i, total, direct, second, m.mean_u, m.mean_v, beyond, direct_beyond)


def _at(known: _Pairs, here: slice) -> _Pairs:
    t, i, total, direct, second, *rest = known
    return _Pairs(t[here], i[here], total.at(here), direct.at(here), rows_of(second, here), *(field[here] for field in rest))


def _remainders(readout: Readout, tokens: Tokens, unigram: Unigram, token: int, points: Points, pairs: _Pairs) -> Tensor:
    """Sum what the pairs of one token are beyond second order, ``[5, pairs]``.

    Returns:
        Of the whole move ``Σ p r``; ``Σ p e^Δ (l + Δ)``; and ``Δ`` under the unigram distribution, which a softcap alone has and
        which is summed over the points that stand alone. ``Σ p r`` with the norm frozen; and held along ``v``.
    """
    W, w = readout.unembedding[points.ids], points.weight
    y, u = tokens.directions[:, token] @ W.T, readout.w_out[pairs.neuron] @ W.T
    z = y[-1] + readout.logit_bias[points.ids]
    capped = readout.cap(z)
    s = None if readout.softcap is None else readout.cap_slope(capped)
    log_p = capped - tokens.log_z[token] - tokens.mean_log_p[token]  # centred

    def change(move: Move) -> tuple[Tensor, Tensor]:
        """``Δ`` and its first order, centred, ``[pairs, points]``."""
        move = Move(tuple(c[:, None] for c in move.along), move.write[:, None])
        centre = move.linear(tokens.mean_x[:, token], pairs.mean_u[:, None])
        linear = move.linear(y[:, None], u)
        if s is None:
            linear -= centre
            return linear, linear
        return readout.cap(z + linear) - capped - centre, s * linear - centre

    delta, first = change(pairs.total)
    second = first + 0.5 * first.square()
    growth = delta.expm1()
    beyond = growth - second
    with_l = growth * (log_p + delta) + (delta - first) - log_p * second - first.square()
    frequency = (delta - first) @ torch.where(points.alone, unigram.log_frequency[points.ids].exp(), 0)
    along_v = pairs.second.along_v[:, None] * (unigram.direction[points.ids] - pairs.mean_v[:, None])
    held = _beyond(delta - along_v, first - along_v)
    return torch.stack([beyond @ w, with_l @ w, frequency, _beyond(*change(pairs.direct)) @ w, held @ w])


def _beyond(delta: Tensor, first: Tensor) -> Tensor:
    """``e^Δ`` without its orders up to the second."""
    return delta.expm1() - first - 0.5 * first.square()


def _with_remainders(
    pairs: _Pairs, total: Tensor, with_l: Tensor, frequency: Tensor, direct: Tensor, held: Tensor
) -> TokenEffects:
    """Effects from the two orders that are known and what is beyond them."""
    second, beyond = pairs.second, pairs.beyond_at_target
    growth = 0.5 * second.variance + total
    of_p = second.with_l + 0.5 * second.with_l_squared + second.variance + with_l
    log_mean = growth.log1p()
    return TokenEffects(
        loss=log_mean - second.at_target - beyond,
        direct_loss=(0.5 * second.direct_variance + direct).log1p() - second.direct_at_target - pairs.direct_beyond_at_target,
        entropy=log_mean - of_p / (1 + growth),
        frequency_kl=log_mean - second.under_frequency - frequency,
        loss_without_frequency=(0.5 * second.held_variance + held).log1p() - second.held_at_target - beyond,
    )
