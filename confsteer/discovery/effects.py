"""What each neuron of the last MLP does to the output, by mean ablation.

Ablating neuron ``i`` at a token sets its activation ``a`` to its mean ``μ``: with ``δ = μ − a`` the residual ``h`` becomes
``h + δ w_i``. With ``x = z − b`` (logits less their bias), ``u_i = W_U w_i`` and ``σ`` the norm's denominator, the
logits move by

    Δ = z' − z = α x + β u_i        α = σ/σ' − 1,  β = δ/σ'        (total effect)
                                    α = 0,         β = δ/σ         (direct effect: the norm is frozen)

and ``σ'`` follows from ``‖h + δw‖² = ‖h‖² + 2δ h·w + δ²‖w‖²``. (Stolfo et al. 2024, arXiv 2406.16254, sections 2–4; the
frequency effect moves ``z'`` back along the unigram direction ``v`` to its projection before the ablation.)

**Cumulant expansion.** Evaluating every (token, neuron) pair over the vocabulary takes ``T·N·V`` exponentials. With
``p = softmax(z)``, ``ℓ = log p`` and cumulants under ``p`` (a tilde marks a centred variable)

    log Z' − log Z = log E_p[e^Δ]  = κ(Δ) + ½ κ(Δ,Δ) + O(Δ³)

For the entropy, ``p' ∝ p e^Δ`` gives ``H' = −E_p'[ℓ] − E_p'[Δ] + log E_p[e^Δ]``. An expectation under the tilted ``p'`` is
``E_p'[f] = E_p[f] + κ(f,Δ) + ½ κ(f,Δ,Δ) + …``; with ``f = Δ`` that is ``κ(Δ) + κ(Δ,Δ) + …``, so that

    H' − H = −κ(ℓ,Δ) − ½ κ(ℓ,Δ,Δ) − ½ κ(Δ,Δ) + O(Δ³)

``Δ`` is linear in ``x`` and ``u_i``, so every cumulant is a polynomial in α and β with coefficients that are matrix
products: what is linear in ``u_i`` goes through ``(p ⊙ f) @ W_U`` and is ``d_model`` wide; only ``E_p[u²]`` and ``E_p[ℓ̃u²]``
need ``[T, V] × [V, N]``. Pairs whose ``κ(Δ,Δ)`` exceeds a threshold are then evaluated exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.frequency import Unigram
from confsteer.discovery.readout import Readout

EXACT_ABOVE = 5e-3
"""Pairs with ``Var_p[Δ]`` above this (in nats²) are evaluated exactly; `tests/discovery/test_effects.py` holds the result."""
WORKING_SET = 2**25
"""Elements of the largest temporary tensors (128 MiB in float32): tokens and neurons are chunked to stay below."""


CACHED_SET = 2**18
"""Elements of the temporaries of exact evaluation, about twenty passes over each: small enough to stay in a core's cache."""


class TokenStates(NamedTuple):
    """What a model left in its last layer at some tokens."""

    activations: Tensor
    """Input of the last MLP's output projection, ``[tokens, n_neurons]``."""
    residual: Tensor
    """Input of the final norm, ``[tokens, d_model]``."""
    targets: Tensor
    """Ids of the tokens that follow, ``[tokens]``."""
    window: Tensor
    """Which window each token is in, ``[tokens]``."""


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
    """Of the output entropy."""
    unigram_kl: Tensor
    """Of ``KL(P_model ‖ P_freq)``."""


class _Tokens(NamedTuple):
    """What all neurons share at a chunk of tokens: moments under ``p = softmax(z)``.

    ``x``, ``l`` (for ``log p``) are centred under ``p``. A name like ``p_lx`` is ``Σ_t p l x W_U[t]``, ``[tokens, d_model]``:
    its product with ``w_i`` is ``E_p[l x u_i]``.
    """

    residual: Tensor  # centred if the norm centres, [tokens, d_model]
    targets: Tensor  # [tokens]
    p: Tensor  # [tokens, vocab]
    log_p: Tensor  # [tokens, vocab]
    x: Tensor  # [tokens, vocab]
    sigma: Tensor  # this and the scalars below: [tokens, 1]
    x_target: Tensor
    x_frequency: Tensor  # expectation of x under the unigram distribution
    x_on_v: Tensor
    var_x: Tensor
    cov_lx: Tensor
    k_lxx: Tensor
    mean_v: Tensor
    var_v: Tensor
    cov_xv: Tensor
    p_1: Tensor
    p_x: Tensor
    p_l: Tensor
    p_lx: Tensor
    p_v: Tensor

    @classmethod
    def measure(cls, readout: Readout, residual: Tensor, targets: Tensor, unigram: Unigram) -> _Tokens:
        W, v = readout.unembedding, unigram.direction
        residual = readout.centre(residual)
        sigma = readout.norm_scale(residual)[:, None]
        x = (residual / sigma) @ W.T
        log_p = torch.log_softmax(x + readout.logit_bias, dim=-1)
        p = log_p.exp()
        log_p -= (p * log_p).sum(dim=-1, keepdim=True)
        x -= (p * x).sum(dim=-1, keepdim=True)
        px, pl = p * x, p * log_p
        plx = pl * x
        mean_v = (p @ v)[:, None]
        return cls(
            residual=residual,
            targets=targets,
            p=p,
            log_p=log_p,
            x=x,
            sigma=sigma,
            x_target=x.gather(1, targets[:, None]),
            x_frequency=(x @ unigram.log_frequency.exp())[:, None],
            x_on_v=(x @ v)[:, None],  # v sums to zero: the mean taken off x does not matter
            var_x=(px * x).sum(dim=-1, keepdim=True),
            cov_lx=plx.sum(dim=-1, keepdim=True),
            k_lxx=(plx * x).sum(dim=-1, keepdim=True),
            mean_v=mean_v,
            var_v=(p @ v.square())[:, None] - mean_v.square(),
            cov_xv=(px @ v)[:, None],
            p_1=p @ W,
            p_x=px @ W,
            p_l=pl @ W,
            p_lx=plx @ W,
            p_v=(p * v) @ W,
        )


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
    step = max(1, WORKING_SET // readout.vocab_size)
    effects = TokenEffects(*(torch.empty(states.activations.shape, device=states.residual.device) for _ in range(5)))
    slopes = TokenSlopes(*(torch.empty_like(effects.loss) for _ in range(2)))
    for start in range(0, len(states.residual), step):
        rows = slice(start, start + step)
        tokens = _Tokens.measure(readout, states.residual[rows], states.targets[rows], unigram)
        for first in range(0, readout.n_neurons, step):
            block = slice(first, first + step)
            delta = mean[block].float() - states.activations[rows, block].float()
            block_effects, block_slopes = _block_effects(readout, tokens, delta, block, unigram, exact_above)
            for whole, part in zip((*effects, *slopes), (*block_effects, *block_slopes), strict=True):
                whole[rows, block] = part
    return effects, slopes


def _block_effects(
    readout: Readout, tokens: _Tokens, delta: Tensor, block: slice, unigram: Unigram, exact_above: float
) -> tuple[TokenEffects, TokenSlopes]:
    """Effects of adding ``delta`` ``[tokens, neurons in block]`` to the activations of one block of neurons."""
    w, W, v = readout.w_out[block], readout.unembedding, unigram.direction
    sigma = tokens.sigma
    u = w @ W.T  # [neurons, vocab]
    u_squared = u.square()
    mean_u, cov_xu, cov_lu = tokens.p_1 @ w.T, tokens.p_x @ w.T, tokens.p_l @ w.T
    var_u = (tokens.p @ u_squared.T - mean_u.square()).clamp_min_(0)
    k_lxu = tokens.p_lx @ w.T - mean_u * tokens.cov_lx
    k_luu = (tokens.p * tokens.log_p) @ u_squared.T - 2 * mean_u * cov_lu
    del u_squared
    cov_uv = tokens.p_v @ w.T - mean_u * tokens.mean_v
    u_target = W[tokens.targets] @ w.T
    u_frequency = (unigram.log_frequency.exp() @ W) @ w.T

    # σ'² = σ² (1 + growth), and α = σ/σ' − 1 without cancellation.
    dot = tokens.residual @ w.T
    growth = (2 * delta * dot + delta.square() * w.square().sum(dim=1)) / (readout.d_model * sigma.square())
    new_over_old = (1 + growth).clamp_min(torch.finfo(growth.dtype).tiny).sqrt()
    alpha = -growth / (new_over_old * (1 + new_over_old))
    beta, beta_direct = delta / (sigma * new_over_old), delta / sigma
    c = alpha * tokens.x_on_v + beta * (u @ v)  # how far Δ goes along v

    variance = alpha.square() * tokens.var_x + 2 * alpha * beta * cov_xu + beta.square() * var_u
    variance_direct = beta_direct.square() * var_u
    variance_frequency = variance - 2 * c * (alpha * tokens.cov_xv + beta * cov_uv) + c.square() * tokens.var_v
    loss_to_first_order = -alpha * tokens.x_target + beta * (mean_u - u_target)
    effects = TokenEffects(
        loss=loss_to_first_order + 0.5 * variance,
        direct_loss=beta_direct * (mean_u - u_target) + 0.5 * variance_direct,
        entropy=-(alpha * tokens.cov_lx + beta * cov_lu)
        - 0.5 * (alpha.square() * tokens.k_lxx + 2 * alpha * beta * k_lxu + beta.square() * k_luu)
        - 0.5 * variance,
        frequency_kl=-alpha * tokens.x_frequency + beta * (mean_u - u_frequency) + 0.5 * variance,
        loss_without_frequency=loss_to_first_order - c * (tokens.mean_v - v[tokens.targets][:, None]) + 0.5 * variance_frequency,
    )

    largest = torch.maximum(torch.maximum(variance, variance_direct), variance_frequency)
    for pairs in (largest > exact_above).nonzero().split(max(1, CACHED_SET // readout.vocab_size)):
        t, i = pairs.unbind(dim=1)
        exact = _exact_pairs(tokens, t, u[i], alpha[t, i], beta[t, i], beta_direct[t, i], c[t, i], unigram)
        for approximate, values in zip(effects, exact, strict=True):
            approximate[t, i] = values

    # dz/da = u/σ − (h·w)/(dσ²) x;  dH = −Cov(l, dz);  dKL(P ‖ P_freq) = Cov(l − log p_freq, dz).
    shrink = -dot / (readout.d_model * sigma.square())
    entropy_slope = -(shrink * tokens.cov_lx + cov_lu / sigma)
    frequency_slope = unigram.length * (shrink * tokens.cov_xv + cov_uv / sigma)
    return effects, TokenSlopes(entropy=entropy_slope, unigram_kl=-entropy_slope - frequency_slope)


def _exact_pairs(
    tokens: _Tokens, t: Tensor, u: Tensor, alpha: Tensor, beta: Tensor, beta_direct: Tensor, c: Tensor, unigram: Unigram
) -> TokenEffects:
    """The effects of pairs of a token ``t`` ``[pairs]`` and a neuron with logit write ``u`` ``[pairs, vocab]``, exactly.

    Differences are formed before exponentials, so that small effects keep their digits: with ``Δ`` centred under ``p``,
    ``log E_p[e^Δ] = log1p(E_p[expm1(Δ)])``.
    """
    p, log_p, x, target = tokens.p[t], tokens.log_p[t], tokens.x[t], tokens.targets[t][:, None]

    def centred_log_mean_exp(delta: Tensor) -> tuple[Tensor, Tensor]:
        delta = delta - (p * delta).sum(-1, keepdim=True)
        return delta, (p * delta.expm1()).sum(-1).log1p()

    total = alpha[:, None] * x + beta[:, None] * u
    delta, log_mean = centred_log_mean_exp(total)
    loss = log_mean - delta.gather(1, target)[:, 0]
    tilt = p * (delta - log_mean[:, None]).expm1()  # p' − p
    entropy = -(tilt * (log_p + delta)).sum(-1) + log_mean  # E_p[delta] is zero
    frequency_kl = log_mean - delta @ unigram.log_frequency.exp()
    delta, log_mean = centred_log_mean_exp(beta_direct[:, None] * u)
    direct_loss = log_mean - delta.gather(1, target)[:, 0]
    delta, log_mean = centred_log_mean_exp(total - c[:, None] * unigram.direction)
    return TokenEffects(loss, direct_loss, entropy, frequency_kl, log_mean - delta.gather(1, target)[:, 0])


def argmax_changes(readout: Readout, states: TokenStates, mean: Tensor) -> Tensor:
    """Whether ablating a neuron changes the most likely next token, exactly, ``[tokens, n_neurons]`` bool.

    For a few neurons: pass a readout and states of these only. Arguments as in `ablation_effects`.
    """
    changed = torch.empty(states.activations.shape, dtype=torch.bool, device=states.residual.device)
    step = max(1, WORKING_SET // readout.vocab_size)
    for start in range(0, len(states.residual), step):
        rows = slice(start, start + step)
        h = readout.centre(states.residual[rows])
        sigma = readout.norm_scale(h)
        x = (h / sigma[:, None]) @ readout.unembedding.T
        argmax = (x + readout.logit_bias).argmax(dim=-1)
        for neuron, w in enumerate(readout.w_out):
            delta = mean[neuron].float() - states.activations[rows, neuron].float()
            new_sigma = readout.norm_scale(h + delta[:, None] * w)
            logits = x * (sigma / new_sigma)[:, None] + readout.logit_bias
            logits += (delta / new_sigma)[:, None] * (readout.unembedding @ w)
            changed[rows, neuron] = logits.argmax(dim=-1) != argmax
    return changed
