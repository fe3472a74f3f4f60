"""Exact effects of pairs of a token and a neuron, over the whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.frequency import Unigram
from confsteer.discovery.moments import Chunk, Moments, Tokens, blocks, vocabulary_chunks
from confsteer.discovery.readout import CACHED_SET, Move, Readout, products


class TokenEffects(NamedTuple):
    """Effects of ablating each neuron at each token, in nats, ``[tokens, n_neurons]`` float32."""

    loss: Tensor
    """Change of the next-token loss."""
    direct_loss: Tensor
    """The same with the final norm frozen."""
    entropy: Tensor
    """Change of the output entropy."""
    frequency_kl: Tensor
    """Change of ``KL(P_freq ‖ P_model)``."""
    loss_without_frequency: Tensor
    """Change of the loss with the logits held at their original projection on the unigram direction."""


def evaluate(
    readout: Readout,
    tokens: Tokens,
    moments: Moments,
    delta: Tensor,
    unigram: Unigram,
    pairs: Tensor,
    effects: TokenEffects,
) -> None:
    """Overwrite the `effects` of `pairs` ``[pairs, 2]`` of a token and a neuron by their exact values.

    Differences are formed before exponentials, so that small effects keep their digits: with ``q = p (e^Δ − 1)`` and
    ``A = Σ q``, ``log E_p[e^Δ] = log1p(A)`` and ``E_p'[g] = (E_p[g] + Σ q g)/(1 + A)``. Only sums over the vocabulary are
    needed, so it is taken in chunks.
    """
    t, i = (column.contiguous() for column in pairs.unbind(dim=1))
    total, direct = (Move(tuple(c[t, i] for c in move.along), move.write[t, i]) for move in readout.move(tokens.state, delta))
    mean_u, mean_v, targets = moments.mean_u[t, i], moments.mean_v[t, 0], tokens.targets[t]
    # How far Δ goes along v (under a softcap to first order: that is how the held logits are defined).
    c = total.linear(moments.x_on_v[:, t, 0], moments.u_on_v[t, i])
    # For each of the three effects Σ q and Δ at the target; for the total also Σ p Δ, Σ f Δ and Σ q (l + Δ).
    sums = torch.zeros(9, len(pairs), dtype=torch.float64, device=delta.device)
    neurons, i = i.unique(return_inverse=True)
    frequency = unigram.log_frequency.exp()
    first_pair = torch.searchsorted(t, torch.arange(len(delta) + 1, device=t.device)).tolist()
    for columns in vocabulary_chunks(readout, len(delta)):
        W, v, f = readout.unembedding[columns], unigram.direction[columns], frequency[columns]
        y, u = products(tokens.directions, W), readout.w_out[neurons] @ W.T
        for rows in blocks(len(delta), y.shape[-1]):
            chunk = Chunk.of(readout, tokens, y, rows, columns)
            own = chunk.x if readout.softcap is None else y[:, rows]

            for first in range(first_pair[rows.start], first_pair[rows.stop], _pairs_at_once(y)):
                block = slice(first, min(first + _pairs_at_once(y), first_pair[rows.stop]))
                token = t[block] - rows.start
                p = chunk.p[token]
                at_target = (targets[block, None] - columns.start).clamp(0, p.shape[1] - 1)
                inside = (targets[block] >= columns.start) & (targets[block] < columns.stop)
                delta_z, direct_delta = (
                    _change(readout, _at(move, block), chunk, own, token, u[i[block]], mean_u[block], columns)
                    for move in (total, direct)
                )
                held_delta = delta_z - c[block, None] * (v - mean_v[block, None])
                q = delta_z.exp().sub_(1).mul_(p)
                direct_q, held_q = (d.exp().sub_(1).mul_(p) for d in (direct_delta, held_delta))
                of_target = (torch.where(inside, d.gather(1, at_target)[:, 0], 0) for d in (delta_z, direct_delta, held_delta))
                of_total = ((p * delta_z).sum(-1), delta_z @ f, q.mul(chunk.log_p[token].add_(delta_z)).sum(-1))
                sums[:, block] += torch.stack((q.sum(-1), direct_q.sum(-1), held_q.sum(-1), *of_target, *of_total))
    growth, direct_growth, held_growth, at_target, direct_at_target, held_at_target, of_p, of_f, of_q = sums
    exact = TokenEffects(
        loss=growth.log1p() - at_target,
        direct_loss=direct_growth.log1p() - direct_at_target,
        entropy=growth.log1p() - (of_p + of_q) / (1 + growth),
        frequency_kl=growth.log1p() - of_f,
        loss_without_frequency=held_growth.log1p() - held_at_target,
    )
    for approximate, values in zip(effects, exact, strict=True):
        approximate[t, pairs[:, 1]] = values.to(approximate.dtype)


def _at(move: Move, pairs: slice) -> Move:
    return Move(tuple(c[pairs, None] for c in move.along), move.write[pairs, None])


def _change(
    readout: Readout, move: Move, chunk: Chunk, own: Tensor, token: Tensor, u: Tensor, mean_u: Tensor, columns: slice
) -> Tensor:
    """``Δ`` of some pairs ``[pairs, columns]``, less a constant that no probability notices and that keeps it small."""
    delta_z = u * move.write
    for along, direction in zip(move.along, own, strict=False):
        delta_z.add_(direction[token].mul_(along))
    if readout.softcap is not None:
        logits = own[-1][token].add_(readout.logit_bias[columns]).add_(delta_z)
        delta_z = readout.cap(logits).sub_(chunk.z[token])
    return delta_z.sub_(move.write * mean_u[:, None])


def _pairs_at_once(y: Tensor) -> int:
    return max(1, CACHED_SET // y.shape[-1])
