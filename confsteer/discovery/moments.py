"""Moments of the output distribution and of the neurons' writes, the coefficients of the expansion in `effects`.

Tokens, vocabulary and neurons are all taken in chunks, so the memory needed depends on none of them. Elementwise work is done on
blocks that stay in a core's cache, where it is ten times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.cores import exponential, on_all_cores
from confsteer.last_layer.readout import WORKING_SET, Readout, ReadoutState, products
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

MAX_TOKENS = 2048
"""Number of tokens at once beyond which nothing gets faster."""


def tokens_at_once(n_neurons: int) -> int:
    """Number of tokens that `ablation_effects` works on at a time. It is fastest when given that many."""
    return max(64, min(MAX_TOKENS, WORKING_SET // max(1, n_neurons)))


class Tokens(NamedTuple):
    """A chunk of tokens, with the sums that normalise and centre everything under ``p``."""

    state: ReadoutState
    directions: Tensor  # the token's own directions over σ, the residual last: [K, tokens, d_model]
    targets: Tensor  # [tokens]
    log_z: Tensor  # [tokens, 1]
    mean_log_p: Tensor  # [tokens, 1]
    mean_x: Tensor  # [K, tokens, 1]

    @classmethod
    def measure(cls, readout: Readout, states: TokenStates) -> Tokens:
        state = readout.state(states.residual, states.mlp_output)
        directions = state.directions
        n_directions, n = directions.shape[:2]
        # A running softmax over chunks of the vocabulary: largest logit so far, and Σe^(z−largest) · (1, z, x_k).
        largest = directions.new_full((n, 1), -torch.inf)
        sums = directions.new_zeros(2 + n_directions, n, 1)
        for columns in vocabulary_chunks(readout, n):
            y = products(directions, readout.unembedding[columns])

            def add(rows: slice, y: Tensor = y, columns: slice = columns) -> None:
                z, x, _ = _cap(readout, y[:, rows], columns)
                new_largest = torch.maximum(largest[rows], z.amax(dim=-1, keepdim=True))
                sums[:, rows] *= (largest[rows] - new_largest).exp()
                largest[rows] = new_largest
                e = z - new_largest
                exponential(e, out=e)
                sums[0, rows] += e.sum(dim=-1, keepdim=True)
                sums[1, rows] += (e * z).sum(dim=-1, keepdim=True)
                sums[2:, rows] += (e * x).sum(dim=-1, keepdim=True)

            on_all_cores(add, readout.blocks(n, y.shape[-1]), y.device)
        log_z = largest + sums[0].log()
        return cls(state, directions, states.targets, log_z, sums[1] / sums[0] - log_z, sums[2:] / sums[0])

    def at(self, rows: slice) -> Tokens:
        """Some of the tokens."""
        return Tokens(
            self.state.at(rows),
            self.directions[:, rows],
            self.targets[rows],
            self.log_z[rows],
            self.mean_log_p[rows],
            self.mean_x[:, rows],
        )


class Chunk(NamedTuple):
    """A block of tokens on a chunk of the vocabulary."""

    p: Tensor  # [tokens, columns]
    log_p: Tensor  # centred under p, [tokens, columns]
    x: Tensor  # centred under p, [K, tokens, columns]
    s: Tensor | None  # derivative of the softcap, [tokens, columns]

    @classmethod
    def of(cls, readout: Readout, tokens: Tokens, y: Tensor, rows: slice, columns: slice) -> Chunk:
        z, x, s = _cap(readout, y[:, rows], columns)
        log_p = z - tokens.log_z[rows]
        p = exponential(log_p)
        return cls(p, log_p.sub_(tokens.mean_log_p[rows]), x - tokens.mean_x[:, rows], s)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Ask the processor: without the instruction bfloat16 is emulated slowly. An old torch cannot tell.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def vocabulary_chunks(readout: Readout, n_tokens: int) -> Iterator[slice]:
    step = max(64, WORKING_SET // max(n_tokens, readout.n_neurons))
    for start in range(0, readout.vocab_size, step):
        yield slice(start, min(start + step, readout.vocab_size))


def _cap(readout: Readout, y: Tensor, columns: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, directions and the softcap's derivative: ``z``, ``x_k`` and ``s`` of `confsteer.discovery.effects`."""
    z = y[-1] + readout.logit_bias[columns]
    if readout.softcap is None:
        return z, y, None
    z = readout.cap(z)
    s = readout.cap_slope(z)
    return z, s * y, s


class Moments(NamedTuple):
    """Moments under ``p``: ``[…, tokens, n_neurons]`` if ``u`` is in the name, otherwise ``[…, tokens, 1]``.

    A leading dimension goes over the token's own directions ``x_k``; a second one over pairs of them. Covariances and third
    cumulants ``k`` are centred.
    """

    cov_xx: Tensor
    cov_lx: Tensor
    k_lxx: Tensor
    cov_xv: Tensor
    x_frequency: Tensor  # expectation under the unigram distribution
    x_on_v: Tensor
    mean_v: Tensor
    var_v: Tensor
    mean_u: Tensor
    var_u: Tensor
    cov_lu: Tensor
    k_luu: Tensor
    cov_uv: Tensor
    cov_xu: Tensor
    k_lxu: Tensor
    u_frequency: Tensor
    u_on_v: Tensor

    def at(self, rows: slice) -> Moments:
        """The moments of some of the tokens."""
        return Moments(*(field[..., rows, :] for field in self))

    def of_pairs(self, token: Tensor, neuron: Tensor) -> Moments:
        """The moments of pairs of a token and a neuron, by index ``[pairs]``: ``[…, pairs]``."""
        return Moments(*(field[..., token, neuron if field.shape[-1] > 1 else 0] for field in self))

    @classmethod
    def measure(
        cls, readout: Readout, tokens: Tokens, unigram: Unigram, on_progress: Callable[[float], object] = lambda share: None
    ) -> Moments:
        """Take the moments of a chunk of tokens.

        Args:
            readout: the model's last layer.
            tokens: the tokens.
            unigram: the corpus's unigram distribution.
            on_progress: called with the share of the work that is done.
        """
        n_directions, n = tokens.directions.shape[:2]
        new = tokens.directions.new_zeros
        # Squares are part of the second order only: half precision, where it is faster, is precise enough.
        second_order = torch.bfloat16 if has_fast_bfloat16(new(0).device) else torch.float32
        frequency = unigram.frequency
        # E_p[… u] has the weights p, pl, pv, p x_k, p l x_k; under a softcap the means of u under the unigram distribution
        # and along v differ from token to token too. Few neurons are cheaper one by one than d_model directions.
        few = readout.n_neurons < readout.d_model
        n_linear = 3 + 2 * n_directions + (0 if readout.softcap is None else 2)
        linear = new(n_linear, n, readout.n_neurons if few else readout.d_model)
        quadratic = new(2, n, readout.n_neurons)
        of_v, of_x, of_xx = new(2, n, 1), new(4, n_directions, n, 1), new(2, n_directions, n_directions, n, 1)
        chunks = list(vocabulary_chunks(readout, n))
        # Reuse memory: new memory in every chunk costs much more.
        all_weights = new(n_linear + (0 if readout.softcap is None else 2), n, chunks[0].stop)
        for columns in chunks:
            W, v, f = readout.unembedding[columns], unigram.direction[columns], frequency[columns]
            # Elementwise work, in blocks that stay in the cache.
            y, weights = products(tokens.directions, W), all_weights[:, :, : columns.stop - columns.start]

            def weigh(
                rows: slice, y: Tensor = y, v: Tensor = v, f: Tensor = f, weights: Tensor = weights, columns: slice = columns
            ) -> None:
                chunk = Chunk.of(readout, tokens, y, rows, columns)
                parts, *sums = _weights(chunk, v, f)
                for whole, part in zip((of_v, of_x, of_xx), sums, strict=True):
                    whole[..., rows, :] += part
                for whole, part in zip(weights, parts, strict=True):
                    whole[rows] = part

            on_all_cores(weigh, readout.blocks(n, y.shape[-1]), y.device)
            # Matrix products, over all tokens of the chunk. Weights of E_p[… u²]: p and pl, under a softcap times s².
            squares = weights[:2] if readout.softcap is None else weights[-2:]
            u = readout.w_out @ W.T
            linear.flatten(0, 1).addmm_(weights[:n_linear].flatten(0, 1), u.T if few else W)
            quadratic += squares.to(second_order) @ u.square_().to(second_order).T
            on_progress(columns.stop / readout.vocab_size)
        if not few:
            linear = linear @ readout.w_out.T
        mean_u, cov_lu, mean_uv = linear[:3]
        cov_xu, lxu = linear[3 : 3 + n_directions], linear[3 + n_directions : 3 + 2 * n_directions]
        u_frequency, u_on_v = _fixed_means(readout, unigram, mean_u) if readout.softcap is None else linear[-2:]
        # Centre u and v: the x_k and l are centred already.
        cov_lx, cov_xv, x_frequency, x_on_v = of_x
        mean_v = of_v[0]
        return cls(
            cov_xx=of_xx[0],
            cov_lx=cov_lx,
            k_lxx=of_xx[1],
            cov_xv=cov_xv,
            x_frequency=x_frequency,
            x_on_v=x_on_v,
            mean_v=mean_v,
            var_v=of_v[1] - mean_v.square(),
            mean_u=mean_u,
            var_u=(quadratic[0] - mean_u.square()).clamp_min_(0),
            cov_lu=cov_lu,
            k_luu=quadratic[1] - 2 * mean_u * cov_lu,
            cov_uv=mean_uv - mean_u * mean_v,
            cov_xu=cov_xu,
            k_lxu=lxu - mean_u * cov_lx,
            u_frequency=u_frequency,
            u_on_v=u_on_v,
        )


def _fixed_means(readout: Readout, unigram: Unigram, like: Tensor) -> tuple[Tensor, Tensor]:
    """Means of ``u`` under the unigram distribution and along ``v``: without a softcap the same for every token."""
    rows = unigram.frequency, unigram.direction
    under_frequency, along_v = ((row @ readout.unembedding @ readout.w_out.T).expand_as(like) for row in rows)
    return under_frequency, along_v


def _weights(chunk: Chunk, v: Tensor, f: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Weights of the expectations of ``u``, and what a chunk adds to those of ``v``, of the ``x_k`` and of pairs of them."""
    p, log_p, x, s = chunk
    pl, pv, px = p * log_p, p * v, p * x
    plx = pl * x
    parts = [p, pl, pv, *px, *plx]
    of_x = _sums(plx, px * v, x * f, x * v)
    of_xx = _sums(px[:, None] * x, plx[:, None] * x)
    return parts if s is None else _before_the_cap(parts, s, f, v), _sums(pv, pv * v), of_x, of_xx


def _before_the_cap(parts: list[Tensor], s: Tensor, f: Tensor, v: Tensor) -> list[Tensor]:
    """Weights of writes before a softcap, whose derivative ``s`` they carry: linear ones, two more, and those of squares."""
    linear = [s * part for part in (*parts, f.expand_as(s), v.expand_as(s))]
    return [*linear, s * linear[0], s * linear[1]]


def _sums(*terms: Tensor) -> Tensor:
    """Each term ``[…, columns]`` summed over the vocabulary, ``[terms, …, 1]``."""
    return torch.stack([term.sum(dim=-1, keepdim=True) for term in terms])
