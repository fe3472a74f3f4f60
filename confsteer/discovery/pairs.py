"""Effects of chosen pairs of a token and a neuron, whose ``Δ`` is too large for the expansion in `effects`.

**Sums over the vocabulary by equal masses.** A vocabulary has a quarter of a million tokens, most of them far down in the tail.
Each token with a probability of ``1/M`` or more stands for itself. The others are taken in the order of their ids. One in each
``ε/S`` of probability stands for that much, where ``ε`` is their mass and ``S = ⌈εM⌉``. That makes at most ``M`` tokens, and
takes no random number.

**Only the remainder is summed this way.** The terms of first and second order in ``Δ`` are known over the whole vocabulary from
`confsteer.discovery.moments`. With ``r(Δ) = e^Δ − 1 − Δ − Δ²/2`` and ``Δ`` centred under ``p``

    E_p[e^Δ] − 1 = ½ κ(Δ,Δ) + Σ p r(Δ)

so the points carry only the third order and above. ``tests/discovery/test_pairs.py`` bounds the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from confsteer.discovery.moments import Moments, Tokens
from confsteer.discovery.second_order import AtTarget, SecondOrder
from confsteer.discovery.token_effects import TokenEffects
from confsteer.last_layer.cores import exponential, on_all_cores
from confsteer.last_layer.readout import WORKING_SET, Move, Readout, products
from confsteer.last_layer.unigram import Unigram

POINTS = 2048
"""``M``: the most tokens of the vocabulary that stand for all."""
LARGE, POINTS_IF_LARGE = 0.25, 2**15
"""``Var_p[Δ]`` of a pair (in nats²) above which more points stand for the tail, because ``e^Δ`` makes the tail larger."""


class Points(NamedTuple):
    """Tokens that stand for the whole vocabulary, for each of some distributions: ``[rows, points]``."""

    ids: Tensor
    weight: Tensor
    """Probability that each stands for. It is 0 for points that only pad a row."""
    alone: Tensor
    """Whether each stands only for itself, bool."""
    used: Tensor
    """Number of points in a row before its padding, ``[rows]``."""

    @classmethod
    def of(cls, p: Tensor, most: int) -> Points:
        """Choose the points of distributions ``[rows, vocab]``: at most `most` of each, and one for rounding."""
        if p.shape[-1] <= most + 1:
            every = torch.arange(p.shape[-1], device=p.device).expand_as(p)
            return cls(every, p, torch.ones_like(p, dtype=torch.bool), p.new_full((len(p),), p.shape[-1], dtype=torch.long))
        large = p >= 1 / most
        row, large_ids = large.nonzero().unbind(dim=1)
        n_large = row.bincount(minlength=len(p))[:, None]
        tail = p.masked_fill(large, 0).cumsum(dim=-1, dtype=torch.float64)
        mass = tail[:, -1:]
        n = (mass * most).ceil().clamp(min=1).minimum(most + 1 - n_large)
        count = (n_large + n).long()
        # Take the large ones first, then walk evenly through the tail.
        slot = torch.arange(int(count.max()), device=p.device)
        alone, used = slot < n_large, slot < count
        ids = torch.searchsorted(tail, (slot - n_large + 0.5) * (mass / n)).clamp_max(p.shape[-1] - 1)
        before = n_large.cumsum(dim=0) - n_large
        ids[row, torch.arange(len(row), device=p.device) - before[row, 0]] = large_ids
        weight = torch.where(alone, p.gather(1, ids), torch.where(used, mass / n, 0).to(p))
        return cls(ids, weight, alone, count[:, 0])

    def at(self, rows: Tensor, width: int) -> Points:
        """The points of some of the rows, of which none has more than `width`."""
        return Points(self.ids[rows, :width], self.weight[rows, :width], self.alone[rows, :width], self.used[rows])


class _Pairs(NamedTuple):
    """Pairs, and what is known of them before any sum: ``[…, pairs]``, or ``[…, tokens, pairs of each]``."""

    token: Tensor
    neuron: Tensor
    moves: Move
    second: SecondOrder
    mean_u: Tensor
    mean_v: Tensor
    beyond_at_target: Tensor
    """Part of each move at the target that a softcap makes, beyond first order."""

    def at(self, here: Tensor) -> _Pairs:
        """Some of the pairs, by index of any shape."""
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
    sums = torch.empty(2 * len(known.moves.write) + 2, len(pairs), device=delta.device)
    present, number, count = known.token.unique_consecutive(return_inverse=True, return_counts=True)
    at_once = max(1, WORKING_SET // readout.vocab_size)
    for first, token, of_tokens in zip(
        range(0, len(present), at_once),
        present.split(at_once),
        torch.arange(len(pairs), device=delta.device).split([int(part.sum()) for part in count.split(at_once)]),
        strict=True,
    ):
        y = products(tokens.directions[-1:, token], readout.unembedding)[0]
        if readout.biased:
            y += readout.logit_bias
        p = exponential(readout.cap(y).sub_(tokens.log_z[token]))
        large = known.second.largest_variance[of_tokens] > LARGE
        for most, these in ((POINTS, of_tokens[~large]), (POINTS_IF_LARGE, of_tokens[large])):

            def add(block: tuple[Tensor, Points]) -> None:
                index, points = block
                sums[:, index] = _remainders(readout, tokens, unigram, points, known.at(index))

            on_all_cores(add, _blocks(readout, p, these, number[these] - first, most), p.device)
    for approximate, values in zip(effects, _with_remainders(known, sums), strict=True):
        approximate[known.token, known.neuron] = values


def _blocks(readout: Readout, p: Tensor, pairs: Tensor, row: Tensor, most: int) -> Iterator[tuple[Tensor, Points]]:
    """Blocks of pairs that are worked on at once, ``[tokens, pairs of each]`` of some tokens, and their points.

    Args:
        readout: the model's last layer.
        p: distributions of some tokens, ``[rows, vocab]``.
        pairs: numbers of the pairs, in the order of `row`.
        row: row of `p` with the token of each pair.
        most: points of a row.
    """
    if not len(pairs):
        return
    rows, count = row.unique_consecutive(return_counts=True)
    start, points = count.cumsum(dim=0) - count, Points.of(p[rows], most)
    # Put pairs with about as many points next to each other, to pad rows with as little as possible.
    order = points.used.argsort()
    widths, sizes, first = points.used[order].tolist(), count[order].tolist(), 0
    while first < len(order):
        stop, largest = first + 1, sizes[first]
        while stop < len(order):
            wider = max(largest, sizes[stop])
            if (stop + 1 - first) * widths[stop] * max(readout.d_model, wider) > readout.at_once:
                break
            stop, largest = stop + 1, wider
        some = order[first:stop]
        of_each = torch.arange(largest, device=p.device).minimum(count[some, None] - 1)
        yield pairs[start[some, None] + of_each], points.at(some, widths[stop - 1])
        first = stop


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
    """Sum the remainders of pairs beyond second order, ``[tokens, pairs of each]``.

    Returns:
        ``[…, tokens, pairs]``: ``Σ p r`` of each move, ``Σ p e^Δ (l + Δ)`` of each, and ``Σ p r`` of the whole move held along
        ``v``. The last is that move under the unigram distribution, summed over the points that stand alone. Only a softcap
        makes it differ from zero.
    """
    token, everything = pairs.token[:, 0], points.ids.shape[1] == readout.vocab_size
    W = readout.unembedding if everything else embedding(points.ids, readout.unembedding)
    # [K, tokens, points] and [tokens, pairs, points].
    y = (tokens.directions[:, token].movedim(1, 0) @ W.mT).movedim(1, 0)
    u = readout.w_out[pairs.neuron] @ W.mT
    z = y[-1] + readout.logit_bias[points.ids]
    capped = readout.cap(z)
    log_p = (capped - tokens.log_z[token] - tokens.mean_log_p[token])[:, None]  # centred
    # Δ and its first order, centred: [moves, tokens, pairs, points].
    moves = pairs.moves.at(..., None)
    centre = moves.linear(tokens.mean_x[:, token, :, None], pairs.mean_u[..., None])
    first = moves.linear(y[:, :, None], u)
    if readout.softcap is None:
        delta = first = first.sub_(centre)
    else:
        delta = readout.cap(z[:, None] + first) - capped[:, None] - centre
        first = readout.cap_slope(capped)[:, None] * first - centre
    second = first + 0.5 * first.square()
    growth = delta.expm1()
    with_l = growth * (log_p + delta) + (delta - first) - log_p * second - first.square()
    along_v = pairs.second.along_v[..., None] * (unigram.direction[points.ids][:, None] - pairs.mean_v[..., None])
    held = first[0] - along_v
    held_remainder = (delta[0] - along_v).expm1() - held - 0.5 * held.square()
    frequency = (delta[0] - first[0]) * torch.where(points.alone, unigram.frequency[points.ids], 0)[:, None]
    weighed = torch.cat([growth - second, with_l, held_remainder[None]]) * points.weight[:, None]
    return torch.cat([weighed.sum(dim=-1), frequency.sum(dim=-1)[None]])


def _with_remainders(pairs: _Pairs, sums: Tensor) -> TokenEffects:
    """Compute effects from the first two orders, which are known, and the sums of the remainders."""
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
