"""Exact effects, over the whole vocabulary: of a few neurons at every token, or of chosen pairs of a token and a neuron.

Differences are formed before exponentials, so that small effects keep their digits: with ``q = p (e^Δ − 1)`` and
``A = Σ q``, ``log E_p[e^Δ] = log1p(A)`` and ``E_p'[g] = (E_p[g] + Σ q g)/(1 + A)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.moments import Chunk, Moments, Tokens, blocks, vocabulary_chunks
from confsteer.last_layer.readout import CACHED_SET, FullOutputs, Move, Readout, products
from confsteer.last_layer.unigram import Unigram


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


def exact_effects(readout: Readout, outputs: FullOutputs, delta: Tensor, unigram: Unigram) -> tuple[TokenEffects, Tensor]:
    """Effects of adding ``delta`` ``[tokens, n_neurons]`` to each activation alone, and whether the argmax changes (bool).

    For a few neurons: pass a readout of these only.
    """
    effects = TokenEffects(*(torch.empty_like(delta) for _ in TokenEffects._fields))
    changed = torch.empty_like(delta, dtype=torch.bool)
    u, v, f = readout.w_out @ readout.unembedding.T, unigram.direction, unigram.log_frequency.exp()
    total, direct = readout.move(outputs.state, delta)
    z = readout.cap(outputs.y)
    log_p = z.log_softmax(dim=-1)
    p = log_p.exp()
    log_p -= (p * log_p).sum(dim=-1, keepdim=True)
    step = max(1, CACHED_SET // readout.vocab_size)
    for t, (target, top) in enumerate(zip(outputs.targets.tolist(), outputs.argmax.tolist(), strict=True)):
        pl = p[t] * log_p[t]

        def change(move: Move, neurons: slice, t: int = t) -> Tensor:
            """``Δ`` ``[neurons, vocab]``."""
            change = move.write[t, neurons, None] * u[neurons]
            for along, direction in zip(move.along, outputs.x, strict=False):
                change.addcmul_(along[t, neurons, None], direction[t])
            if readout.softcap is not None:
                change = readout.cap(change.add_(outputs.y[t])).sub_(z[t])
            return change

        for first in range(0, len(u), step):
            neurons = slice(first, first + step)
            delta_z = change(total, neurons)
            tilt = delta_z.exp().sub_(1)
            log_mean = (tilt @ p[t]).log1p()
            effects.loss[t, neurons] = log_mean - delta_z[:, target]
            effects.frequency_kl[t, neurons] = log_mean - delta_z @ f
            of_p = delta_z @ p[t] + tilt @ pl + tilt.mul_(delta_z) @ p[t]
            effects.entropy[t, neurons] = log_mean - of_p / log_mean.exp()
            moved = torch.add(delta_z, z[t], out=tilt)
            changed[t, neurons] = moved.amax(dim=-1) > moved[:, top]
            delta_z.addcmul_((delta_z @ v)[:, None], v, value=-1)
            effects.loss_without_frequency[t, neurons] = _log_mean_exp(delta_z, p[t]) - delta_z[:, target]
            delta_z = change(direct, neurons)
            effects.direct_loss[t, neurons] = _log_mean_exp(delta_z, p[t]) - delta_z[:, target]
    return effects, changed


def _log_mean_exp(delta_z: Tensor, p: Tensor) -> Tensor:
    """``log E_p[e^Δ]`` of ``Δ`` ``[n, vocab]``."""
    return (delta_z.exp().sub_(1) @ p).log1p()


def evaluate_pairs(
    readout: Readout,
    tokens: Tokens,
    moments: Moments,
    delta: Tensor,
    unigram: Unigram,
    pairs: Tensor,
    effects: TokenEffects,
) -> None:
    """Overwrite the `effects` of `pairs` ``[pairs, 2]`` of a token and a neuron by their exact values.

    Only sums over the vocabulary are needed, so it is taken in chunks.
    """
    # The moves of the pairs, one after the other, in the order of their tokens.
    t, i = (column.contiguous() for column in pairs.unbind(dim=1))
    total, direct = (Move(tuple(c[t, i] for c in move.along), move.write[t, i]) for move in readout.move(tokens.state, delta))
    mean_u, mean_v, targets = moments.mean_u[t, i], moments.mean_v[t, 0], tokens.targets[t]
    # How far Δ goes along v, under a softcap to first order only: the sum over the vocabulary is not known yet.
    c = total.linear(moments.x_on_v[:, t, 0], moments.u_on_v[t, i])
    # For each of the three effects Σ q and Δ at the target; for the total also Σ f Δ and E_p[Δ] + Σ q (l + Δ).
    sums = torch.zeros(8, len(pairs), dtype=torch.float64, device=delta.device)
    neurons, i = i.unique(return_inverse=True)
    frequency = unigram.log_frequency.exp()
    first_pair = torch.searchsorted(t, torch.arange(len(delta) + 1, device=t.device)).tolist()

    # A chunk of the vocabulary, then a block of tokens, then some of their pairs: what is worked on stays in the cache.
    for columns in vocabulary_chunks(readout, len(delta)):
        W, v, f = readout.unembedding[columns], unigram.direction[columns], frequency[columns]
        y, u = products(tokens.directions, W), readout.w_out[neurons] @ W.T
        for rows in blocks(len(delta), y.shape[-1]):
            chunk = Chunk.of(readout, tokens, y, rows, columns)
            own = chunk.x if readout.softcap is None else y[:, rows]
            for first in range(first_pair[rows.start], first_pair[rows.stop], _pairs_at_once(y)):
                block = slice(first, min(first + _pairs_at_once(y), first_pair[rows.stop]))
                token = t[block] - rows.start
                p = chunk.p.index_select(0, token)
                at_target = (targets[block, None] - columns.start).clamp(0, p.shape[1] - 1)
                inside = (targets[block] >= columns.start) & (targets[block] < columns.stop)
                chosen = u.index_select(0, i[block])
                delta_z, direct_delta = (
                    _change(readout, _at(move, block), chunk, own, token, chosen, mean_u[block], columns)
                    for move in (total, direct)
                )
                q = _tilt(delta_z, p)
                of_total = [q.sum(-1), delta_z @ f, (q * delta_z).sum(-1) + q.mul_(chunk.log_p.index_select(0, token)).sum(-1)]
                if readout.softcap is not None:
                    of_total[2] += (p * delta_z).sum(-1)  # otherwise Δ is centred
                of_total.append(delta_z.gather(1, at_target)[:, 0].where(inside, 0))
                of_direct = [_tilt(direct_delta, p).sum(-1), direct_delta.gather(1, at_target)[:, 0].where(inside, 0)]
                delta_z.addcmul_(v - mean_v[block, None], c[block, None], value=-1)
                of_held = [_tilt(delta_z, p).sum(-1), delta_z.gather(1, at_target)[:, 0].where(inside, 0)]
                sums[:, block] += torch.stack([*of_total, *of_direct, *of_held])

    # The effects from their sums, see the module docstring.
    growth, of_f, of_q, at_target, direct_growth, direct_at_target, held_growth, held_at_target = sums
    exact = TokenEffects(
        loss=growth.log1p() - at_target,
        direct_loss=direct_growth.log1p() - direct_at_target,
        entropy=growth.log1p() - of_q / (1 + growth),
        frequency_kl=growth.log1p() - of_f,
        loss_without_frequency=held_growth.log1p() - held_at_target,
    )
    for approximate, values in zip(effects, exact, strict=True):
        approximate[t, pairs[:, 1]] = values.to(approximate.dtype)


def _tilt(delta_z: Tensor, p: Tensor) -> Tensor:
    """``q = p (e^Δ − 1)``."""
    return delta_z.exp().sub_(1).mul_(p)


def _at(move: Move, pairs: slice) -> Move:
    return Move(tuple(c[pairs, None] for c in move.along), move.write[pairs, None])


def _change(
    readout: Readout, move: Move, chunk: Chunk, own: Tensor, token: Tensor, u: Tensor, mean_u: Tensor, columns: slice
) -> Tensor:
    """``Δ`` of some pairs ``[pairs, columns]``, less a constant that no probability notices and that keeps it small."""
    delta_z = u * move.write
    for along, direction in zip(move.along, own, strict=False):
        delta_z.addcmul_(direction.index_select(0, token), along)
    if readout.softcap is not None:
        logits = own[-1].index_select(0, token).add_(readout.logit_bias[columns]).add_(delta_z)
        delta_z = readout.cap(logits).sub_(chunk.z.index_select(0, token))
    return delta_z.sub_(move.write * mean_u[:, None])


def _pairs_at_once(y: Tensor) -> int:
    return max(1, CACHED_SET // y.shape[-1])
