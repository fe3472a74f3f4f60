"""Exact effects of a few neurons at every token, over the whole vocabulary.

Differences are formed before exponentials, so that small effects keep their digits: with ``q = p (e^Δ − 1)`` and
``A = Σ q``, ``log E_p[e^Δ] = log1p(A)`` and ``E_p'[g] = (E_p[g] + Σ q g)/(1 + A)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.moments import blocks
from confsteer.last_layer.readout import CACHED_SET, FullOutputs, Move, Readout
from confsteer.last_layer.states import rows_of
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


class TokenSlopes(NamedTuple):
    """Derivatives with respect to each neuron's activation, in nats per unit of activation, ``[tokens, n_neurons]``."""

    entropy: Tensor
    """Slope of the output entropy."""
    unigram_kl: Tensor
    """Slope of ``KL(P_model ‖ P_freq)``."""


class ExactEffects(NamedTuple):
    """Effects of ablating a few neurons, and the unsteered output."""

    effects: TokenEffects
    slopes: TokenSlopes
    argmax_changed: Tensor
    """Whether the most likely next token changes, bool ``[tokens, n_neurons]``."""
    entropy: Tensor
    """Entropy of the unsteered output, in nats, ``[tokens]``."""
    loss: Tensor
    """Loss of the unsteered output, in nats, ``[tokens]``."""


def exact_effects(readout: Readout, outputs: FullOutputs, delta: Tensor, unigram: Unigram) -> ExactEffects:
    """Effects of adding ``delta`` ``[tokens, n_neurons]`` to each activation alone.

    For a few neurons: pass a readout of these only.
    """
    effects = TokenEffects(*(torch.empty_like(delta) for _ in TokenEffects._fields))
    slopes = TokenSlopes(*(torch.empty_like(delta) for _ in TokenSlopes._fields))
    changed = torch.empty_like(delta, dtype=torch.bool)
    entropy, loss = delta.new_empty(2, len(delta))
    u = readout.w_out @ readout.unembedding.T
    total, direct = readout.move(outputs.state, delta)
    # Some tokens by the vocabulary stay in the cache.
    for rows in blocks(len(delta), readout.vocab_size):
        here = ExactEffects(rows_of(effects, rows), rows_of(slopes, rows), changed[rows], entropy[rows], loss[rows])
        _evaluate(readout, outputs.at(rows), u, unigram, (total.at(rows), direct.at(rows)), here)
    return ExactEffects(effects, slopes, changed, entropy, loss)


def _evaluate(
    readout: Readout, outputs: FullOutputs, u: Tensor, unigram: Unigram, moves: tuple[Move, Move], into: ExactEffects
) -> None:
    """Evaluate a few tokens; ``u`` ``[n_neurons, vocab]``."""
    v, f, (total, direct) = unigram.direction, unigram.log_frequency.exp(), moves
    z = readout.cap(outputs.y)
    log_p = z.log_softmax(dim=-1)
    torch.neg(log_p.gather(1, outputs.targets[:, None])[:, 0], out=into.loss)
    p = log_p.exp()
    pl = p * log_p
    torch.neg(pl.sum(dim=-1), out=into.entropy)
    pl.addcmul_(p, into.entropy[:, None])  # log p centred
    for slope, values in zip(into.slopes, _slopes(readout, outputs, z, p, pl, u, unigram), strict=True):
        slope.copy_(values)
    step = max(1, CACHED_SET // readout.vocab_size)
    for t, (target, top) in enumerate(zip(outputs.targets.tolist(), outputs.argmax.tolist(), strict=True)):

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
            into.effects.loss[t, neurons] = log_mean - delta_z[:, target]
            into.effects.frequency_kl[t, neurons] = log_mean - delta_z @ f
            of_p = delta_z @ p[t] + tilt @ pl[t] + tilt.mul_(delta_z) @ p[t]
            into.effects.entropy[t, neurons] = log_mean - of_p / log_mean.exp()
            moved = torch.add(delta_z, z[t], out=tilt)
            into.argmax_changed[t, neurons] = moved.amax(dim=-1) > moved[:, top]
            delta_z.addcmul_((delta_z @ v)[:, None], v, value=-1)
            into.effects.loss_without_frequency[t, neurons] = _log_mean_exp(delta_z, p[t]) - delta_z[:, target]
            delta_z = change(direct, neurons)
            into.effects.direct_loss[t, neurons] = _log_mean_exp(delta_z, p[t]) - delta_z[:, target]


def _log_mean_exp(delta_z: Tensor, p: Tensor) -> Tensor:
    """``log E_p[e^Δ]`` of ``Δ`` ``[n, vocab]``."""
    return (delta_z.exp().sub_(1) @ p).log1p()


def _slopes(readout: Readout, outputs: FullOutputs, z: Tensor, p: Tensor, pl: Tensor, u: Tensor, unigram: Unigram) -> TokenSlopes:
    """Slopes of each neuron: ``dH = −Cov(log p, dz)`` and ``dKL(P ‖ P_freq) = Cov(log p − log p_freq, dz)``.

    ``pl`` is ``p log p`` with ``log p`` centred.
    """
    slope, v = readout.slope(outputs.state), unigram.direction

    def along(weights: Tensor) -> Tensor:
        """Covariance of what `weights` stand for with the slope of the logits, ``[tokens, n_neurons]``."""
        if readout.softcap is not None:
            weights = weights * readout.cap_slope(z)
        of_x = torch.stack([(weights * x).sum(dim=-1, keepdim=True) for x in outputs.x])
        return slope.linear(of_x, weights @ u.T)

    entropy = -along(pl)
    centred_v = v - (p @ v)[:, None]
    return TokenSlopes(entropy=entropy, unigram_kl=-entropy - unigram.length * along(centred_v.mul_(p)))
