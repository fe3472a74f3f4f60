"""Sums over the vocabulary of a few neurons, by an exponential for each token, neuron and vocabulary entry.

Any model and any size of the moves will do. Differences are formed before exponentials, so that small effects keep their digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.token_effects import Sums, TokenSlopes
from confsteer.last_layer.cores import Scratch, exponential
from confsteer.last_layer.readout import FullOutputs, Move, Readout
from confsteer.last_layer.unigram import Unigram


def sum_exponentials(
    readout: Readout,
    outputs: FullOutputs,
    u: Tensor,
    unigram: Unigram,
    moves: Move,
    into: Sums,
    slopes: TokenSlopes | None,
    scratch: Scratch,
) -> None:
    """Sum up a few neurons at a few tokens, all at once.

    Args:
        readout: the model's last layer, of these neurons only.
        outputs: the unsteered output at the tokens.
        u: the neurons' writes to the logits, ``[n_neurons, vocab]``.
        unigram: the corpus's unigram distribution.
        moves: the neurons' moves, ``[moves, tokens, n_neurons]``.
        into: where to write the results.
        slopes: where to write the slopes; None to leave them out.
        scratch: memory for temporary tensors.
    """
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
    if slopes is not None:
        for slope, values in zip(slopes, _slopes(readout, outputs, z, p, pl, u, unigram, scratch), strict=True):
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
    """Sum up some neurons at a few tokens, with moves ``[moves, tokens, n, 1]``, into fields of `Sums`."""
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


def _slopes(
    readout: Readout, outputs: FullOutputs, z: Tensor, p: Tensor, pl: Tensor, u: Tensor, unigram: Unigram, scratch: Scratch
) -> TokenSlopes:
    """Slopes of each neuron: ``dH = −Cov(log p, dz)`` and ``dKL(P ‖ P_freq) = Cov(log p − log p_freq, dz)``.

    ``pl`` is ``p log p`` with ``log p`` centred.
    """
    slope, v, product = readout.slope(outputs.state), unigram.direction, scratch.empty("product", *p.shape)

    def along(weights: Tensor) -> Tensor:
        """Covariance of the quantity behind `weights` with the slope of the logits, ``[tokens, n_neurons]``."""
        if readout.softcap is not None:
            weights = weights * readout.cap_slope(z)
        of_x = torch.stack([torch.mul(weights, x, out=product).sum(dim=-1, keepdim=True) for x in outputs.x])
        return slope.linear(of_x, weights @ u.T)

    entropy = -along(pl)
    centred_v = torch.sub(v, (p @ v)[:, None], out=scratch.empty("v", *p.shape))
    return TokenSlopes(entropy=entropy, unigram_kl=-entropy - unigram.length * along(centred_v.mul_(p)))
