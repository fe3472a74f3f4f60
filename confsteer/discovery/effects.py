"""Effect of each neuron of the last MLP on the output, by mean ablation.

Ablating neuron ``i`` at a token sets its activation ``a`` to its mean ``μ``: it adds ``δ = μ − a``. The logits move by

    Δ = Σ_k η_k x_k + β u_i

where ``u_i = W_U w_i``, ``x_k`` are the logits along the token's own directions (mostly just one, ``x = W_U h/σ``) and the
coefficients have closed forms (`confsteer.last_layer.readout`). The direct effect freezes the final norm. The frequency
effect moves ``z' = z + Δ`` back along the unigram direction ``v`` to its projection before the ablation. (Stolfo et al.
2024, arXiv 2406.16254, sections 2–4.)

**Cumulant expansion.** Evaluating every (token, neuron) pair over the vocabulary takes ``T·N·V`` exponentials. With
``p = softmax(z)``, ``ℓ = log p`` and cumulants under ``p`` (a tilde marks a centred variable)

    log Z' − log Z = log E_p[e^Δ]  = κ(Δ) + ½ κ(Δ,Δ) + O(Δ³)

For the entropy, ``p' ∝ p e^Δ`` gives ``H' = −E_p'[ℓ] − E_p'[Δ] + log E_p[e^Δ]``. An expectation under the tilted ``p'`` is
``E_p'[f] = E_p[f] + κ(f,Δ) + ½ κ(f,Δ,Δ) + …``; with ``f = Δ`` that is ``κ(Δ) + κ(Δ,Δ) + …``, so that

    H' − H = −κ(ℓ,Δ) − ½ κ(ℓ,Δ,Δ) − ½ κ(Δ,Δ) + O(Δ³)

``Δ`` is linear in the ``x_k`` and ``u_i``, so every cumulant is a polynomial in the coefficients whose own coefficients are
matrix products. What is linear in ``u_i`` goes through ``(p ⊙ f) @ W_U`` and is ``d_model`` wide; only ``E_p[u²]`` and
``E_p[ℓ̃u²]`` need ``[T, V] × [V, N]``. Pairs whose ``κ(Δ,Δ)`` exceeds a threshold are then evaluated exactly.

**Softcap.** With ``z = c tanh(y/c)`` the logits before the cap move by ``Σ_k η_k y_k + β u_i`` and those after it by
``s`` times that to first order, ``s = 1 − (z/c)²``: every ``x_k`` and ``u_i`` above carries the factor ``s`` of its token
and vocabulary entry. What this leaves out is second order, but
at most ``0.8/c`` of the second-order term (3 % of it at ``c = 30``); exact pairs apply the cap itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.exact import TokenEffects, evaluate_pairs
from confsteer.discovery.moments import Moments, Tokens, blocks, tokens_at_once
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

EXACT_ABOVE = 5e-3
"""Pairs with ``Var_p[Δ]`` above this (in nats²) are evaluated exactly; `tests/discovery/test_effects.py` holds the result."""


class TokenSlopes(NamedTuple):
    """Derivatives with respect to each neuron's activation, in nats per unit of activation, ``[tokens, n_neurons]``."""

    entropy: Tensor
    """Slope of the output entropy."""
    unigram_kl: Tensor
    """Slope of ``KL(P_model ‖ P_freq)``."""


def ablation_effects(
    readout: Readout, states: TokenStates, mean: Tensor, unigram: Unigram, *, exact_above: float = EXACT_ABOVE
) -> tuple[TokenEffects, TokenSlopes]:
    """Mean-ablation effects and slopes of every neuron at every token, by the expansion of the module docstring.

    Args:
        readout: the model's last layer.
        states: of the tokens to measure on.
        mean: activations that ablation puts in place, ``[n_neurons]``.
        unigram: the corpus's unigram distribution.
        exact_above: variance of ``Δ`` in nats² above which a pair is evaluated exactly.
    """
    like = states.residual.new_empty(states.activations.shape, dtype=torch.float32)
    effects = TokenEffects(*(torch.empty_like(like) for _ in TokenEffects._fields))
    slopes = TokenSlopes(*(torch.empty_like(like) for _ in TokenSlopes._fields))
    step = tokens_at_once(readout.n_neurons)
    for start in range(0, len(like), step):
        rows = slice(start, start + step)
        tokens = Tokens.measure(readout, states.at(rows))
        delta = mean.float() - states.activations[rows].float()
        moments = Moments.measure(readout, tokens, unigram)
        here = TokenEffects(*(effect[rows] for effect in effects))
        slopes_here = TokenSlopes(*(slope[rows] for slope in slopes))
        above = []
        for block, expanded, block_slopes, variance in _expand(readout, tokens, moments, delta, unigram):
            for whole, part in zip((*here, *slopes_here), (*expanded, *block_slopes), strict=True):
                whole[block] = part
            pairs = (variance > exact_above).nonzero()
            pairs[:, 0] += block.start
            above.append(pairs)
        # Where the expansion is not good enough, overwrite it.
        if len(pairs := torch.cat(above)):
            evaluate_pairs(readout, tokens, moments, delta, unigram, pairs, here)
    return effects, slopes


def _expand(
    readout: Readout, tokens: Tokens, moments: Moments, delta: Tensor, unigram: Unigram
) -> Iterator[tuple[slice, TokenEffects, TokenSlopes, Tensor]]:
    """Expand effects and slopes to second order, a block of tokens at a time.

    Yields:
        Which tokens; their effects and slopes; and the largest variance of ``Δ`` that any of the effects rests on, in nats²,
        ``[tokens, n_neurons]`` each.
    """
    W, v = readout.unembedding, unigram.direction
    for rows in blocks(len(delta), readout.n_neurons):
        m, state, targets = moments.at(rows), tokens.state.at(rows), tokens.targets[rows]
        total, direct = readout.move(state, delta[rows])
        # The write and the token's own directions at the token that came.
        u_target = W[targets] @ readout.w_out.T
        y_target = (tokens.directions[:, rows] * W[targets]).sum(dim=-1, keepdim=True)
        if readout.softcap is not None:
            s = readout.cap_slope(readout.cap(y_target[-1] + readout.logit_bias[targets, None]))
            u_target, y_target = s * u_target, s * y_target
        x_target = y_target - tokens.mean_x[:, rows]
        no_x = torch.zeros_like(x_target)  # the x_k are centred

        # Second cumulants of Δ: of the whole move, with the norm frozen, and held along v.
        variance = total.bilinear(m.cov_xx, m.cov_xu, m.var_u)
        direct_variance = direct.bilinear(m.cov_xx, m.cov_xu, m.var_u)
        c = total.linear(m.x_on_v, m.u_on_v)  # how far Δ goes along v
        held_variance = variance - 2 * c * total.linear(m.cov_xv, m.cov_uv) + c.square() * m.var_v
        first_order = total.linear(no_x, m.mean_u) - total.linear(x_target, u_target)
        block = TokenEffects(
            loss=first_order + 0.5 * variance,
            direct_loss=direct.linear(no_x, m.mean_u) - direct.linear(x_target, u_target) + 0.5 * direct_variance,
            entropy=-total.linear(m.cov_lx, m.cov_lu) - 0.5 * (total.bilinear(m.k_lxx, m.k_lxu, m.k_luu) + variance),
            frequency_kl=total.linear(no_x, m.mean_u) - total.linear(m.x_frequency, m.u_frequency) + 0.5 * variance,
            loss_without_frequency=first_order - c * (m.mean_v - v[targets][:, None]) + 0.5 * held_variance,
        )
        # dH = −Cov(l, dz);  dKL(P ‖ P_freq) = Cov(l − log p_freq, dz).
        slope = readout.slope(state)
        entropy_slope = -slope.linear(m.cov_lx, m.cov_lu)
        frequency_slope = unigram.length * slope.linear(m.cov_xv, m.cov_uv)
        block_slopes = TokenSlopes(entropy=entropy_slope, unigram_kl=-entropy_slope - frequency_slope)
        yield rows, block, block_slopes, torch.maximum(torch.maximum(variance, direct_variance), held_variance)
