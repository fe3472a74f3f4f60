"""Exact effects of a few neurons at every token, over the whole vocabulary.

Differences are formed before exponentials, so that small effects keep their digits. With ``q = p (e^Δ − 1)`` and ``A = Σ q``:
``log E_p[e^Δ] = log1p(A)`` and ``E_p'[g] = (E_p[g] + Σ q g)/(1 + A)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.cores import exponential, on_all_cores
from confsteer.last_layer.readout import FullOutputs, Move, Readout
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
    direct_entropy: Tensor
    """The same with the final norm frozen."""
    straight_entropy: Tensor
    """The same with the write norm frozen too, in a model that has one."""
    frequency_kl: Tensor
    """Change of ``KL(P_freq ‖ P_model)``."""
    loss_without_frequency: Tensor
    """Change of the loss with the logits held at their original projection on the unigram direction."""

    @classmethod
    def of_moves(cls, *, loss: Tensor, entropy: Tensor, frequency_kl: Tensor, loss_without_frequency: Tensor) -> TokenEffects:
        """Make it from changes of loss and entropy by each of the moves of `Readout.move`, their first dimension."""
        return cls(loss[0], loss[1], entropy[0], entropy[1], entropy[-1], frequency_kl, loss_without_frequency)


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

    @classmethod
    def empty(cls, delta: Tensor) -> ExactEffects:
        """Make room for the effects of adding ``delta`` ``[tokens, n_neurons]``."""
        effects = TokenEffects(*(torch.empty_like(delta) for _ in TokenEffects._fields))
        slopes = TokenSlopes(*(torch.empty_like(delta) for _ in TokenSlopes._fields))
        return cls(effects, slopes, torch.empty_like(delta, dtype=torch.bool), *delta.new_empty(2, len(delta)))


def exact_effects(readout: Readout, outputs: FullOutputs, delta: Tensor, unigram: Unigram) -> ExactEffects:
    """Compute the effects of adding ``delta`` ``[tokens, n_neurons]`` to each activation alone.

    It is meant for a few neurons: pass a readout of these only.
    """
    effects, slopes, changed, entropy, loss = whole = ExactEffects.empty(delta)
    u = readout.w_out @ readout.unembedding.T
    moves = readout.move(outputs.state, delta)

    def evaluate(rows: slice) -> None:
        here = ExactEffects(rows_of(effects, rows), rows_of(slopes, rows), changed[rows], entropy[rows], loss[rows])
        _evaluate(readout, outputs.at(rows), u, unigram, moves.at(slice(None), rows), here)

    # Take few tokens, so that they by the vocabulary stay in the cache.
    on_all_cores(evaluate, readout.blocks(len(delta), readout.vocab_size), delta.device)
    return whole


def _evaluate(readout: Readout, outputs: FullOutputs, u: Tensor, unigram: Unigram, moves: Move, into: ExactEffects) -> None:
    """Evaluate a few tokens; ``u`` ``[n_neurons, vocab]``."""
    z = readout.cap(outputs.y)
    log_p = z.log_softmax(dim=-1)
    torch.neg(log_p.gather(1, outputs.targets[:, None])[:, 0], out=into.loss)
    p = exponential(log_p)
    pl = p * log_p
    torch.neg(pl.sum(dim=-1), out=into.entropy)
    pl.addcmul_(p, into.entropy[:, None])  # log p centred
    for slope, values in zip(into.slopes, _slopes(readout, outputs, z, p, pl, u, unigram), strict=True):
        slope.copy_(values)
    step = max(1, readout.at_once // readout.vocab_size)
    for first in range(0, len(u), step):
        neurons = slice(first, first + step)
        for tokens in readout.blocks(len(z), readout.vocab_size * len(u[neurons])):
            some = _Unsteered(*(field[..., tokens, :] for field in (outputs.x, outputs.y, z, p, pl)))
            move = moves.at(slice(None), tokens, neurons, None)
            at = outputs.targets[tokens], outputs.argmax[tokens]
            effects, changed = _ablate(readout, some, at, u[neurons], unigram, move)
            into.argmax_changed[tokens, neurons] = changed
            for whole, part in zip(into.effects, effects, strict=True):
                whole[tokens, neurons] = part


class _Unsteered(NamedTuple):
    """The unsteered output at a few tokens, ``[tokens, vocab]``."""

    x: Tensor  # [K, tokens, vocab]
    y: Tensor
    z: Tensor
    p: Tensor
    pl: Tensor  # p log p, with log p centred


def _ablate(
    readout: Readout, before: _Unsteered, at: tuple[Tensor, Tensor], u: Tensor, unigram: Unigram, moves: Move
) -> tuple[TokenEffects, Tensor]:
    """Evaluate some neurons at a few tokens, with moves ``[moves, tokens, n, 1]``, and whether the argmax changes.

    `at` are the ids of the tokens that follow and of the likeliest ones, ``[tokens]`` each.
    """
    at_target, at_top = (ids[:, None, None].expand(-1, len(u), 1) for ids in at)
    p, pl, f, v = before.p, before.pl, unigram.frequency, unigram.direction
    loss, entropy = [], []
    for number in range(len(moves.write)):
        move = moves.at(number)
        delta_z = move.write * u
        # Leave out one more of the token's own directions in each move, from the last.
        for along, direction in zip(move.along[: len(before.x) - number], before.x, strict=False):
            delta_z.addcmul_(along, direction[:, None])
        if readout.softcap is not None:
            delta_z = readout.cap(delta_z.add_(before.y[:, None])).sub_(before.z[:, None])
        delta_z.sub_(_dot(p, delta_z)[..., None])  # a constant that no probability notices, and that keeps it small
        growth = exponential(delta_z).sub_(1)
        log_mean = _dot(p, growth).log1p()
        loss.append(log_mean - delta_z.gather(-1, at_target)[..., 0])
        of_p = _dot(pl, growth) + _dot(p, growth.mul_(delta_z))
        entropy.append(log_mean - of_p / log_mean.exp())
        if number == 0:
            frequency_kl = log_mean - delta_z @ f
            moved = torch.add(delta_z, before.z[:, None], out=growth)
            changed = moved.amax(dim=-1) > moved.gather(-1, at_top)[..., 0]
            held = delta_z.addcmul_((delta_z @ v)[..., None], v, value=-1)
            at_target_held = held.gather(-1, at_target)[..., 0]
            without_frequency = _dot(p, exponential(held, out=held).sub_(1)).log1p() - at_target_held
    effects = TokenEffects.of_moves(
        loss=torch.stack(loss),
        entropy=torch.stack(entropy),
        frequency_kl=frequency_kl,
        loss_without_frequency=without_frequency,
    )
    return effects, changed


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of `values` ``[tokens, n, vocab]`` with each token's `weights` ``[tokens, vocab]``: ``[tokens, n]``."""
    # Multiply this way round: as a product with columns it takes thirty times as long on a CPU.
    return torch.bmm(weights[:, None], values.transpose(1, 2))[:, 0]


def _slopes(readout: Readout, outputs: FullOutputs, z: Tensor, p: Tensor, pl: Tensor, u: Tensor, unigram: Unigram) -> TokenSlopes:
    """Slopes of each neuron: ``dH = −Cov(log p, dz)`` and ``dKL(P ‖ P_freq) = Cov(log p − log p_freq, dz)``.

    ``pl`` is ``p log p`` with ``log p`` centred.
    """
    slope, v = readout.slope(outputs.state), unigram.direction

    def along(weights: Tensor) -> Tensor:
        """Covariance of the quantity behind `weights` with the slope of the logits, ``[tokens, n_neurons]``."""
        if readout.softcap is not None:
            weights = weights * readout.cap_slope(z)
        of_x = torch.stack([(weights * x).sum(dim=-1, keepdim=True) for x in outputs.x])
        return slope.linear(of_x, weights @ u.T)

    entropy = -along(pl)
    centred_v = v - (p @ v)[:, None]
    return TokenSlopes(entropy=entropy, unigram_kl=-entropy - unigram.length * along(centred_v.mul_(p)))
