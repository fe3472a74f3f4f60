"""Exact effects of a few neurons at every token, over the whole vocabulary.

Differences are formed before exponentials, so that small effects keep their digits. With ``q = p (e^Δ − 1)`` and ``A = Σ q``:
``log E_p[e^Δ] = log1p(A)`` and ``E_p'[g] = (E_p[g] + Σ q g)/(1 + A)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.cores import Scratch, exponential, on_all_cores
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
    def of_no_tokens(cls, n_neurons: int, device: torch.device) -> ExactEffects:
        """Make the effects of some neurons at no token."""
        none = torch.empty(0, n_neurons, device=device)
        effects, slopes = TokenEffects(*[none] * len(TokenEffects._fields)), TokenSlopes(*[none] * len(TokenSlopes._fields))
        return cls(effects, slopes, none.bool(), none[:, 0], none[:, 0])


def exact_effects(readout: Readout, outputs: FullOutputs, delta: Tensor, unigram: Unigram) -> ExactEffects:
    """Compute the effects of adding ``delta`` ``[tokens, n_neurons]`` to each activation alone.

    It is meant for a few neurons: pass a readout of these only.
    """
    u = readout.w_out @ readout.unembedding.T
    moves, scratch = readout.move(outputs.state, delta), Scratch(delta)
    sums, slopes = _Sums.empty(delta, len(moves.write)), TokenSlopes(torch.empty_like(delta), torch.empty_like(delta))

    def evaluate(rows: slice) -> None:
        here = moves.at(slice(None), rows)
        _evaluate(readout, outputs.at(rows), u, unigram, here, rows_of(sums, rows), rows_of(slopes, rows), scratch)

    # Take few tokens, so that they by the vocabulary stay in the cache.
    on_all_cores(evaluate, readout.blocks(len(delta), readout.vocab_size), delta.device)
    effects = sums.effects(unigram.direction[outputs.targets, None])
    return ExactEffects(effects, slopes, sums.argmax_changed, *sums.of_output.unbind(dim=1))


class _Sums(NamedTuple):
    """Sums over the vocabulary, from which all effects follow. To work on them at each block would take longer than to sum."""

    of_moves: Tensor
    """``Σ q``, ``Σ q l``, ``Σ q Δ`` and ``Δ`` at the target, of each move: ``[tokens, moves, 4, n_neurons]``."""
    of_whole: Tensor
    """Values of the whole move, ``[tokens, 5, n_neurons]``.

    They are ``Δ`` under the unigram distribution and along the unigram direction ``v``; ``Σ q`` of the move held along ``v``; the
    largest of the moved logits, and the one that was the largest before.
    """
    of_output: Tensor
    """Entropy and loss of the unsteered output, ``[tokens, 2]``."""

    @classmethod
    def empty(cls, delta: Tensor, n_moves: int) -> _Sums:
        tokens, n = delta.shape
        return cls(delta.new_empty(tokens, n_moves, 4, n), delta.new_empty(tokens, 5, n), delta.new_empty(tokens, 2))

    @property
    def argmax_changed(self) -> Tensor:
        """Whether another logit than before is the largest, bool ``[tokens, n_neurons]``."""
        *_, largest, before = self.of_whole.unbind(dim=1)
        return largest > before

    def effects(self, v_target: Tensor) -> TokenEffects:
        """Compute the effects. `v_target` is ``v`` at the targets, ``[tokens, 1]``."""
        growth, of_l, of_change, at_target = self.of_moves.movedim((1, 2), (1, 0))
        under_frequency, along_v, held, *_ = self.of_whole.unbind(dim=1)
        log_mean = growth.log1p()
        return TokenEffects.of_moves(
            loss=log_mean - at_target,
            entropy=log_mean - (of_l + of_change) / (1 + growth),
            frequency_kl=log_mean[0] - under_frequency,
            loss_without_frequency=held.log1p() - (at_target[0] - along_v * v_target),
        )


def _evaluate(
    readout: Readout,
    outputs: FullOutputs,
    u: Tensor,
    unigram: Unigram,
    moves: Move,
    into: _Sums,
    slopes: TokenSlopes,
    scratch: Scratch,
) -> None:
    """Evaluate a few tokens; ``u`` ``[n_neurons, vocab]``."""
    z, (entropy, loss) = readout.cap(outputs.y), into.of_output.unbind(dim=1)
    log_p, weights = scratch.empty("log p", *z.shape), scratch.empty("weights", len(z), 2, readout.vocab_size)
    p, pl = weights.unbind(dim=1)
    torch.sub(z, z.amax(dim=-1, keepdim=True), out=log_p)
    total = exponential(log_p, out=p).sum(dim=-1, keepdim=True)
    p /= total
    log_p -= total.log()
    torch.neg(log_p.gather(1, outputs.targets[:, None])[:, 0], out=loss)
    torch.mul(p, log_p, out=pl)
    torch.neg(pl.sum(dim=-1), out=entropy)
    pl.addcmul_(p, entropy[:, None])  # log p centred
    for slope, values in zip(slopes, _slopes(readout, outputs, z, p, pl, u, unigram), strict=True):
        slope.copy_(values)
    step = max(1, readout.at_once // readout.vocab_size)
    for first in range(0, len(u), step):
        neurons = slice(first, first + step)
        for tokens in readout.blocks(len(z), readout.vocab_size * len(u[neurons])):
            some = _Unsteered.at(outputs, z, weights, tokens)
            move = moves.at(slice(None), tokens, neurons, None)
            here = into.of_moves[tokens, ..., neurons], into.of_whole[tokens, :, neurons]
            _ablate(readout, some, u[neurons], unigram, move, *here, scratch)


class _Unsteered(NamedTuple):
    """The unsteered output at a few tokens."""

    x: Tensor  # [K, tokens, 1, vocab]
    y: Tensor  # [tokens, 1, vocab]
    z: Tensor  # [tokens, 1, vocab]
    weights: Tensor  # p, and p log p with log p centred: [tokens, 2, vocab]
    target: Tensor  # ids of the tokens that follow, [tokens, 1, 1]
    top: Tensor  # ids of the likeliest tokens, [tokens, 1, 1]

    @classmethod
    def at(cls, outputs: FullOutputs, z: Tensor, weights: Tensor, rows: slice) -> _Unsteered:
        x, targets, top = outputs.x[:, rows, None], outputs.targets[rows], outputs.argmax[rows]
        return cls(x, outputs.y[rows, None], z[rows, None], weights[rows], targets[:, None, None], top[:, None, None])


def _ablate(
    readout: Readout,
    before: _Unsteered,
    u: Tensor,
    unigram: Unigram,
    moves: Move,
    of_moves: Tensor,
    of_whole: Tensor,
    scratch: Scratch,
) -> None:
    """Sum up some neurons at a few tokens, with moves ``[moves, tokens, n, 1]``, into fields of `_Sums`."""
    at_target, at_top = (ids.expand(-1, len(u), 1) for ids in (before.target, before.top))
    weights, shape = before.weights, (len(before.z), *u.shape)
    p, delta, growth = weights[:, :1], scratch.empty("delta", *shape), scratch.empty("growth", *shape)
    for number, into in enumerate(of_moves.unbind(dim=1)):
        move = moves.at(number)
        torch.mul(move.write, u, out=delta)
        # Leave out one more of the token's own directions in each move, from the last.
        for along, direction in zip(move.along[: len(before.x) - number], before.x, strict=False):
            delta.addcmul_(along, direction)
        if readout.softcap is not None:
            delta.copy_(readout.cap(delta.add_(before.y))).sub_(before.z)
        # Take off a constant that no probability notices: it keeps the move small.
        delta.sub_(_dots(p, delta).mT)
        exponential(delta, out=growth).sub_(1)
        into[:, :2] = _dots(weights, growth)
        into[:, 2:3] = _dots(p, growth.mul_(delta))
        into[:, 3] = delta.gather(-1, at_target)[..., 0]
        if number == 0:
            of_whole[:, 0] = delta @ unigram.frequency
            along_v = delta @ unigram.direction
            of_whole[:, 1] = along_v
            moved = torch.add(delta, before.z, out=growth)
            of_whole[:, 3] = moved.amax(dim=-1)
            of_whole[:, 4] = moved.gather(-1, at_top)[..., 0]
            held = delta.addcmul_(along_v[..., None], unigram.direction, value=-1)
            of_whole[:, 2:3] = _dots(p, exponential(held, out=held).sub_(1))


def _dots(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of `values` ``[tokens, n, vocab]`` with each token's `weights` ``[tokens, k, vocab]``: ``[tokens, k, n]``."""
    # Multiply this way round: as a product with columns it takes thirty times as long on a CPU.
    return torch.bmm(weights, values.mT)


def _slopes(readout: Readout, outputs: FullOutputs, z: Tensor, p: Tensor, pl: Tensor, u: Tensor, unigram: Unigram) -> TokenSlopes:
    """Slopes of each neuron: ``dH = −Cov(log p, dz)`` and ``dKL(P ‖ P_freq) = Cov(log p − log p_freq, dz)``.

    ``pl`` is ``p log p`` with ``log p`` centred.
    """
    slope, v = readout.slope(outputs.state), unigram.direction

    def along(weights: Tensor) -> Tensor:
        """Covariance of the quantity behind `weights` with the slope of the logits, ``[tokens, n_neurons]``."""
        if readout.softcap is not None:
            weights = weights * readout.cap_slope(z)
        of_x = torch.stack([torch.linalg.vecdot(weights, x)[:, None] for x in outputs.x])
        return slope.linear(of_x, weights @ u.T)

    entropy = -along(pl)
    centred_v = v - (p @ v)[:, None]
    return TokenSlopes(entropy=entropy, unigram_kl=-entropy - unigram.length * along(centred_v.mul_(p)))
