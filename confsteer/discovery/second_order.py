"""Moves ``Δ`` to second order, from the moments: the same for whole layers and for chosen pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.moments import Moments
from confsteer.discovery.token_effects import TokenEffects
from confsteer.last_layer.readout import Move, Readout


class AtTarget(NamedTuple):
    """The write and the token's own directions at the token that came, not centred under ``p``."""

    u: Tensor
    """``[…]``"""
    x: Tensor
    """As `u`, with a leading dimension over the token's own directions ``x_k``."""
    v: Tensor

    @classmethod
    def of(cls, readout: Readout, bias: Tensor, *, u: Tensor, x: Tensor, v: Tensor) -> AtTarget:
        """Take the values at the targets, times the derivative of a softcap there. `bias` is that of the targets' logits."""
        if readout.softcap is not None:
            s = readout.cap_slope(readout.cap(x[-1] + bias))
            u, x = s * u, s * x
        return cls(u, x, v)


class SecondOrder(NamedTuple):
    """Expectations of ``Δ``, centred under ``p``. The moves are those of `Readout.move`, ``[moves, tokens, n_neurons]`` or
    ``[moves, pairs]``. Fields about the whole move alone have no first dimension.
    """

    variance: Tensor
    """``κ(Δ,Δ)`` of each move."""
    with_l: Tensor
    """``E_p[l Δ]`` of each move."""
    with_l_squared: Tensor
    """``E_p[l Δ²]`` of each move."""
    at_target: Tensor
    """``Δ`` of each move at the token that came."""
    held_variance: Tensor
    """``κ(Δ,Δ)`` of the whole move held along ``v``."""
    held_at_target: Tensor
    along_v: Tensor
    """How far the whole move goes along ``v``."""
    under_frequency: Tensor
    """``Δ`` of the whole move under the unigram distribution."""

    @classmethod
    def of(cls, m: Moments, mean_x: Tensor, target: AtTarget, moves: Move) -> SecondOrder:
        """Compute them from moments, means of the ``x_k`` and values at the target, which broadcast to the moves' shape."""
        x_target = target.x - mean_x
        no_x = x_target.new_zeros(x_target.shape)  # the x_k are centred
        variance = moves.bilinear(m.cov_xx, m.cov_xu, m.var_u)
        at_target = moves.linear(x_target, target.u) - moves.linear(no_x, m.mean_u)
        whole = moves.at(0)
        c = whole.linear(m.x_on_v, m.u_on_v)
        return cls(
            variance=variance,
            with_l=moves.linear(m.cov_lx, m.cov_lu),
            with_l_squared=moves.bilinear(m.k_lxx, m.k_lxu, m.k_luu),
            at_target=at_target,
            held_variance=variance[0] - 2 * c * whole.linear(m.cov_xv, m.cov_uv) + c.square() * m.var_v,
            held_at_target=at_target[0] - c * (target.v - m.mean_v),
            along_v=c,
            under_frequency=whole.linear(m.x_frequency, m.u_frequency) - whole.linear(no_x, m.mean_u),
        )

    def at(self, pairs: Tensor) -> SecondOrder:
        """The expectations of some of the pairs."""
        return SecondOrder(*(field[..., pairs] for field in self))

    @property
    def largest_variance(self) -> Tensor:
        """Largest variance that an effect depends on, in nats²."""
        return torch.maximum(self.variance.amax(dim=0), self.held_variance)

    def effects(self) -> TokenEffects:
        """The effects to second order."""
        half = 0.5 * self.variance
        return TokenEffects.of_moves(
            loss=half - self.at_target,
            entropy=-self.with_l - 0.5 * self.with_l_squared - half,
            frequency_kl=half[0] - self.under_frequency,
            loss_without_frequency=0.5 * self.held_variance - self.held_at_target,
        )
