"""Effects of ablating neurons at each token, and the sums over the vocabulary that they follow from.

With ``q = p (e^Δ − 1)`` and ``A = Σ q``: ``log E_p[e^Δ] = log1p(A)`` and ``E_p'[g] = (E_p[g] + Σ q g)/(1 + A)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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

    @classmethod
    def empty(cls, delta: Tensor) -> TokenSlopes:
        """Make room for the slopes of changes ``[tokens, n_neurons]`` of the activations."""
        return cls(torch.empty_like(delta), torch.empty_like(delta))


class Sums(NamedTuple):
    """Sums over the vocabulary, from which all effects follow. To work on them at each block would take longer than to sum."""

    of_moves: Tensor
    """``Σ q``, ``Σ q l``, ``Σ q Δ`` and ``Δ`` at the target, of each move: ``[tokens, moves, 4, n_neurons]``.

    ``l`` is ``log p``. It and ``Δ`` are centred under ``p``.
    """
    of_whole: Tensor
    """Values of the whole move, ``[tokens, 5, n_neurons]``.

    They are ``Δ`` under the unigram distribution and along the unigram direction ``v``; ``Σ q`` of the move held along ``v``; the
    largest of the moved logits, and the one that was the largest before, up to a constant.
    """
    of_output: Tensor
    """Entropy and loss of the unsteered output, ``[tokens, 2]``."""

    @classmethod
    def empty(cls, delta: Tensor, n_moves: int) -> Sums:
        """Make room for the sums of changes ``[tokens, n_neurons]`` of the activations."""
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
