"""``Δ`` to second order: what the moments say of a move, whole layers or chosen pairs alike."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from confsteer.discovery.exact import TokenEffects
from confsteer.discovery.moments import Moments, Tokens
from confsteer.last_layer.readout import Move, Readout


class AtTarget(NamedTuple):
    """The write and the token's own directions at the token that came, before anything is centred under ``p``."""

    u: Tensor
    """``[…]``"""
    x: Tensor
    """A leading dimension goes over the token's own directions ``x_k``."""
    v: Tensor

    @classmethod
    def of(cls, readout: Readout, tokens: Tokens, u: Tensor, v: Tensor) -> AtTarget:
        """Values at the targets, under a softcap times its derivative there; ``u`` and ``v`` are ``[tokens, n_neurons or 1]``."""
        rows = readout.unembedding[tokens.targets]
        x = (tokens.directions * rows).sum(dim=-1, keepdim=True)
        if readout.softcap is not None:
            s = readout.cap_slope(readout.cap(x[-1] + readout.logit_bias[tokens.targets, None]))
            u, x = s * u, s * x
        return cls(u, x, v)


class SecondOrder(NamedTuple):
    """Expectations of ``Δ``, centred under ``p``, each in the shape of the moves: ``[tokens, n_neurons]`` or ``[pairs]``."""

    variance: Tensor
    """``κ(Δ,Δ)`` of the whole move."""
    direct_variance: Tensor
    """The same with the norm frozen."""
    held_variance: Tensor
    """The same of the whole move held along ``v``."""
    with_l: Tensor
    """``E_p[l Δ]``"""
    with_l_squared: Tensor
    """``E_p[l Δ²]``"""
    under_frequency: Tensor
    """``Δ`` under the unigram distribution."""
    along_v: Tensor
    """How far ``Δ`` goes along ``v``."""
    at_target: Tensor
    direct_at_target: Tensor
    held_at_target: Tensor

    @classmethod
    def of(cls, m: Moments, mean_x: Tensor, target: AtTarget, total: Move, direct: Move) -> SecondOrder:
        """From moments, means of the ``x_k`` and values at the target that broadcast to the moves' shape."""
        x_target = target.x - mean_x
        no_x = x_target.new_zeros(x_target.shape)  # the x_k are centred
        mean, c = total.linear(no_x, m.mean_u), total.linear(m.x_on_v, m.u_on_v)
        variance = total.bilinear(m.cov_xx, m.cov_xu, m.var_u)
        at_target = total.linear(x_target, target.u) - mean
        return cls(
            variance=variance,
            direct_variance=direct.bilinear(m.cov_xx, m.cov_xu, m.var_u),
            held_variance=variance - 2 * c * total.linear(m.cov_xv, m.cov_uv) + c.square() * m.var_v,
            with_l=total.linear(m.cov_lx, m.cov_lu),
            with_l_squared=total.bilinear(m.k_lxx, m.k_lxu, m.k_luu),
            under_frequency=total.linear(m.x_frequency, m.u_frequency) - mean,
            along_v=c,
            at_target=at_target,
            direct_at_target=direct.linear(x_target, target.u) - direct.linear(no_x, m.mean_u),
            held_at_target=at_target - c * (target.v - m.mean_v),
        )

    def effects(self) -> TokenEffects:
        """The effects to second order."""
        half = 0.5 * self.variance
        return TokenEffects(
            loss=half - self.at_target,
            direct_loss=0.5 * self.direct_variance - self.direct_at_target,
            entropy=-self.with_l - 0.5 * self.with_l_squared - half,
            frequency_kl=half - self.under_frequency,
            loss_without_frequency=0.5 * self.held_variance - self.held_at_target,
        )
