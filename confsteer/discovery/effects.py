"""Effect of each neuron of the last MLP on the output, by mean ablation.

Ablating neuron ``i`` at a token sets its activation ``a`` to its mean ``μ``: it adds ``δ = μ − a``. The logits move by

    Δ = Σ_k η_k x_k + β u_i

where ``u_i = W_U w_i``. The ``x_k`` are the logits along the token's own directions: mostly just one, ``x = W_U h/σ``. The
coefficients have closed forms (`confsteer.last_layer.readout`). The direct effect freezes the final norm. The frequency effect
moves ``z' = z + Δ`` back along the unigram direction ``v`` to its projection before the ablation. (Stolfo et al. 2024, arXiv
2406.16254, sections 2–4.)

**Cumulant expansion.** Evaluating every (token, neuron) pair over the vocabulary takes ``T·N·V`` exponentials. With
``p = softmax(z)``, ``ℓ = log p`` and cumulants under ``p`` (a tilde marks a centred variable)

    log Z' − log Z = log E_p[e^Δ]  = κ(Δ) + ½ κ(Δ,Δ) + O(Δ³)

For the entropy, ``p' ∝ p e^Δ`` gives ``H' = −E_p'[ℓ] − E_p'[Δ] + log E_p[e^Δ]``. An expectation under the tilted ``p'`` is
``E_p'[f] = E_p[f] + κ(f,Δ) + ½ κ(f,Δ,Δ) + …``. For ``f = Δ`` that is ``κ(Δ) + κ(Δ,Δ) + …``. Therefore

    H' − H = −κ(ℓ,Δ) − ½ κ(ℓ,Δ,Δ) − ½ κ(Δ,Δ) + O(Δ³)

``Δ`` is linear in the ``x_k`` and ``u_i``, so every cumulant is a polynomial in ``η_k`` and ``β``. The coefficients of that
polynomial are matrix products. Terms linear in ``u_i`` go through ``(p ⊙ f) @ W_U``, which is ``d_model`` wide. Only ``E_p[u²]``
and ``E_p[ℓ̃u²]`` need ``[T, V] × [V, N]``. Pairs whose ``κ(Δ,Δ)`` exceeds a threshold are then evaluated beyond second order.

**Softcap.** With ``z = c tanh(y/c)`` the logits before the cap move by ``Σ_k η_k y_k + β u_i``. To first order, those after it
move by ``s`` times that, with ``s = 1 − (z/c)²``. So every ``x_k`` and ``u_i`` above carries the factor ``s`` of its token and
vocabulary entry. The error is second order, and at most ``0.8/c`` of the second-order term (3 % of it at ``c = 30``). `pairs`
uses the cap itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from confsteer.discovery.moments import Moments, Tokens, tokens_at_once
from confsteer.discovery.pairs import evaluate_pairs
from confsteer.discovery.second_order import AtTarget, SecondOrder
from confsteer.discovery.token_effects import TokenEffects, TokenSlopes
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

PAIRS_ABOVE = 5e-3
"""Pairs with ``Var_p[Δ]`` above this (nats²) are evaluated beyond second order; see `tests/discovery/test_effects.py`."""
SHARE_OF_MOMENTS = 0.8
"""Share of the time that goes into the moments, for progress bars."""


def ablation_effects(
    readout: Readout,
    states: TokenStates,
    mean: Tensor,
    unigram: Unigram,
    *,
    pairs_above: float = PAIRS_ABOVE,
    on_progress: Callable[[float], object] = lambda share: None,
) -> tuple[TokenEffects, TokenSlopes]:
    """Compute mean-ablation effects and slopes of every neuron at every token, by the expansion of the module docstring.

    Args:
        readout: the model's last layer.
        states: states of the tokens to measure on.
        mean: activations that ablation sets the neurons to, ``[n_neurons]``.
        unigram: the corpus's unigram distribution.
        pairs_above: variance of ``Δ`` in nats² above which a pair is evaluated beyond second order.
        on_progress: called with the share of the work that is done.
    """
    like = states.residual.new_empty(states.activations.shape, dtype=torch.float32)
    effects = TokenEffects(*(torch.empty_like(like) for _ in TokenEffects._fields))
    slopes = TokenSlopes(*(torch.empty_like(like) for _ in TokenSlopes._fields))
    step = tokens_at_once(readout.n_neurons)
    for start in range(0, len(like), step):
        rows = slice(start, start + step)
        share = len(like[rows]) / len(like)

        def done(of_step: float, before: float = start / len(like), share: float = share) -> None:
            on_progress(before + share * of_step)

        tokens = Tokens.measure(readout, states.at(rows))
        delta = mean.float() - states.activations[rows].float()
        moments = Moments.measure(readout, tokens, unigram, on_progress=lambda of: done(of * SHARE_OF_MOMENTS))
        here = TokenEffects(*(effect[rows] for effect in effects))
        slopes_here = TokenSlopes(*(slope[rows] for slope in slopes))
        above = []
        for block, second, block_slopes in _expand(readout, tokens, moments, delta, unigram):
            for whole, part in zip((*here, *slopes_here), (*second.effects(), *block_slopes), strict=True):
                whole[block] = part
            pairs = (second.largest_variance > pairs_above).nonzero()
            pairs[:, 0] += block.start
            above.append(pairs)
        # Overwrite the expansion where it is not good enough.
        if len(pairs := torch.cat(above)):
            evaluate_pairs(readout, tokens, moments, delta, unigram, pairs, here)
        done(1)
    return effects, slopes


def _expand(
    readout: Readout, tokens: Tokens, moments: Moments, delta: Tensor, unigram: Unigram
) -> Iterator[tuple[slice, SecondOrder, TokenSlopes]]:
    """Expand effects and slopes to second order, a block of tokens at a time. Yield which tokens, and their results."""
    for rows in readout.blocks(len(delta), readout.n_neurons):
        m, here = moments.at(rows), tokens.at(rows)
        rows_of_targets = readout.unembedding[here.targets]
        target = AtTarget.of(
            readout,
            readout.logit_bias[here.targets, None],
            u=rows_of_targets @ readout.w_out.T,
            x=(here.directions * rows_of_targets).sum(dim=-1, keepdim=True),
            v=unigram.direction[here.targets, None],
        )
        second = SecondOrder.of(m, here.mean_x, target, readout.move(here.state, delta[rows]))
        # dH = −Cov(l, dz);  dKL(P ‖ P_freq) = Cov(l − log p_freq, dz).
        slope = readout.slope(here.state)
        entropy = -slope.linear(m.cov_lx, m.cov_lu)
        along_frequency = unigram.length * slope.linear(m.cov_xv, m.cov_uv)
        yield rows, second, TokenSlopes(entropy=entropy, unigram_kl=-entropy - along_frequency)
