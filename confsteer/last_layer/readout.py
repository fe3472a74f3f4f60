"""The path from the last MLP's activations to the logits, as a few tensors.

After the last MLP's output projection a transformer only has
``[write norm ->] residual add -> final norm -> unembedding [-> softcap]``. All of confsteer's mathematics happens on this path,
in closed form, without a model.

**How a neuron's write moves the logits.** Adding ``δ`` to activation ``i`` turns the residual ``h`` into ``h + δ w_i``. The
logits are ``y = W_U h/σ + b``, before a softcap. With ``u_i = W_U w_i`` and the norm's new denominator ``σ'``,

    y' − y = α (y − b) + β u_i        α = σ/σ' − 1,  β = δ/σ'

Some models normalise the MLP's output ``m`` before adding it (Gemma 2 and 3, OLMo 2). They add ``n = g ⊙ m/ρ``, where ``ρ`` is
the root mean square of ``m``. With ``w_i = g ⊙ (the neuron's own write)`` and ``γ = ρ/ρ' − 1`` the residual becomes
``h + (δ/ρ') w_i + γ n``. So a second one of the token's own directions joins in:

    y' − y = α (y − b) + η W_U n/σ + β u_i        η = γ σ/σ',  β = δ/(ρ'σ')

``σ'`` and ``ρ'`` follow from dot products, since ``‖h + δw‖² = ‖h‖² + 2δ h·w + δ²‖w‖²``: no pass over the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.cores import Scratch, on_all_cores
from confsteer.last_layer.states import TokenStates, rows_of

ROWS_PER_CHUNK = 8192
"""Rows of a weight matrix converted to float64 at a time."""
WORKING_SET = 2**23
"""Elements of the largest temporary tensors over the vocabulary (32 MiB in float32). There are about twenty such tensors."""
STREAMED_SET = 2**24
"""Elements of the logits of some tokens (64 MiB in float32). With half as many tokens at once products take a tenth longer."""
CACHED_SET = 2**19
"""Elements of temporary tensors in elementwise work (2 MiB in float32). Work in a core's cache is ten times faster. But each call
of torch takes Python's lock, for which other cores wait: smaller blocks cost more in calls than they save."""
LAUNCHED_SET = 2**24
"""The same on a GPU, where work must be large to be worth its launch."""
CACHED_ROWS = 1024
"""Rows of the unembedding in a product, on a CPU."""


class NormParameters(NamedTuple):
    """A norm as ``gain * (h − mean(h) if centred) / sqrt(mean(h²) + epsilon) + bias``."""

    gain: Tensor
    """``[d_model]``, ones where the norm has none."""
    bias: Tensor | None
    """``[d_model]``"""
    epsilon: float
    centred: bool
    """Whether it subtracts the mean (LayerNorm) or not (RMSNorm)."""

    def to(self, device: torch.device) -> NormParameters:
        """Copy to a device the tensors that are elsewhere."""
        return self._replace(gain=self.gain.to(device), bias=None if self.bias is None else self.bias.to(device))


@dataclass(frozen=True)
class WriteNorm:
    """An RMSNorm between the last MLP and the residual stream."""

    gain: Tensor
    """``[d_model]``"""
    epsilon: float
    inputs: Tensor
    """Writes to the norm's input per unit of activation, ``[n_neurons, d_model]``."""


class ReadoutState(NamedTuple):
    """Residual and norms of some tokens, as the readout needs them."""

    residual: Tensor
    """Input of the final norm, centred if the norm centres, ``[tokens, d_model]``."""
    sigma: Tensor
    """The final norm's denominator, ``[tokens, 1]``."""
    mlp_output: Tensor | None
    """Input of the write norm, ``[tokens, d_model]``. This and the rest are None in a model without one."""
    rho: Tensor | None
    """The write norm's denominator, ``[tokens, 1]``."""
    normed: Tensor | None
    """Output of the write norm, centred if the final norm centres, ``[tokens, d_model]``."""

    @property
    def directions(self) -> Tensor:
        """The token's own directions that a write moves along, over ``σ``, the residual last: ``[1 or 2, tokens, d_model]``."""
        own = [self.residual] if self.normed is None else [self.normed, self.residual]
        return torch.stack(own) / self.sigma

    def at(self, rows: slice | Tensor) -> ReadoutState:
        """The state of some of the tokens."""
        return rows_of(self, rows)


class Move(NamedTuple):
    """How far the logits (before a softcap) go along a token's own directions and along a neuron's write, ``[…, tokens, n]``.

    ``y' − y = Σ_k along[k] · W_U directions[k] + write · W_U w_i``.
    """

    along: tuple[Tensor, ...]
    write: Tensor

    def at(self, *index: Any) -> Move:
        """Some of the moves."""
        return Move(tuple(along[index] for along in self.along), self.write[index])

    def linear(self, of_x: Tensor, of_u: Tensor) -> Tensor:
        """Evaluate a linear functional of the move, from its values on the directions (first dimension) and on ``W_U w_i``."""
        total = self.write * of_u
        for along, value in zip(self.along, of_x, strict=True):
            total = total + along * value
        return total

    def bilinear(self, of_xx: Tensor, of_xu: Tensor, of_uu: Tensor) -> Tensor:
        """Evaluate a quadratic functional of the move, from its values on pairs of these."""
        total = self.write.square() * of_uu
        for k, along in enumerate(self.along):
            total = total + 2 * along * self.write * of_xu[k]
            for j, other in enumerate(self.along):
                total = total + along * other * of_xx[k, j]
        return total


@dataclass(frozen=True)
class Readout:
    """The last layer of a language model, folded so that every norm and bias on the path is explicit.

    With ``x = residual / norm_scale(residual)`` the logits are ``unembedding @ x + logit_bias``.

    The norm's gain and the logit scale are folded into `unembedding`. A LayerNorm subtracts the mean of its input. For such a
    norm, `w_out` and the rows of `unembedding` are centred over ``d_model``, and the methods below centre every residual. So
    LayerNorm and RMSNorm follow the same formulas. `unembedding` and `logit_bias` are also centred over the vocabulary. That
    adds a constant to all logits of a token, which changes no probability. Before a softcap it would change them, so there
    both are left as they are.
    """

    w_out: Tensor
    """Writes of the last MLP's neurons to the residual per unit of activation, ``[n_neurons, d_model]``."""
    unembedding: Tensor
    """Folded unembedding ``W_U``, ``[vocab, d_model]``."""
    logit_bias: Tensor
    """Bias of the logits, ``[vocab]``; zeros where the model has none."""
    epsilon: float
    """The final norm's epsilon."""
    centred: bool
    """Whether the final norm subtracts the mean (LayerNorm) or not (RMSNorm)."""
    softcap: float | None = None
    """Bound of the logits: ``y`` becomes ``softcap · tanh(y / softcap)``. None in most models."""
    write_norm: WriteNorm | None = None
    """Norm on the MLP's output, whose gain is folded into `w_out`. None in most models."""

    @property
    def n_neurons(self) -> int:
        return self.w_out.shape[0]

    @property
    def d_model(self) -> int:
        return self.w_out.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.unembedding.shape[0]

    @property
    def at_once(self) -> int:
        """Best number of elements of temporary tensors in elementwise work on the device."""
        return CACHED_SET if self.unembedding.device.type == "cpu" else LAUNCHED_SET

    def blocks(self, n: int, width: int) -> Iterator[slice]:
        """Blocks of `n` rows of `width` elements that are best worked on at once."""
        step = max(1, self.at_once // width)
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))

    @classmethod
    def fold(
        cls,
        *,
        w_out: Tensor,
        unembedding: Tensor,
        norm: NormParameters,
        unembedding_bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        write_norm: NormParameters | None = None,
    ) -> Readout:
        """Build from a model's raw weights, in float32.

        Args:
            w_out: ``[n_neurons, d_model]``, any residual multiplier already applied.
            unembedding: raw ``[vocab, d_model]``.
            norm: the final norm.
            unembedding_bias: the unembedding's own bias ``[vocab]``.
            logit_scale: factor of the raw logits.
            softcap: bound of the logits.
            write_norm: an RMSNorm on the MLP's output; None if there is none.
        """
        w_out = w_out.detach().float()
        write = None
        if write_norm is not None:
            write = WriteNorm(write_norm.gain.detach().float(), write_norm.epsilon, inputs=w_out)
            w_out = w_out * write.gain
        raw, gain = unembedding.detach(), norm.gain.detach().float() * logit_scale
        # Convert a few rows at a time: a float32 copy of all of it would be as large as the result.
        folded = torch.empty_like(raw, dtype=torch.float32, memory_format=torch.contiguous_format)
        for rows, of in zip(folded.split(ROWS_PER_CHUNK), raw.split(ROWS_PER_CHUNK), strict=True):
            torch.mul(of, gain, out=rows)
        logit_bias = torch.zeros(len(folded), dtype=torch.float32, device=folded.device)
        if norm.bias is not None:
            logit_bias += raw.float() @ norm.bias.detach().float() * logit_scale
        if unembedding_bias is not None:
            logit_bias += unembedding_bias.detach().float() * logit_scale
        # Centre what the norm would centre, and over the vocabulary, which changes no probability.
        if norm.centred:
            w_out = w_out - w_out.mean(dim=1, keepdim=True)
            folded -= folded.mean(dim=1, keepdim=True)
        if softcap is None:
            folded -= folded.mean(dim=0)
            logit_bias -= logit_bias.mean()
        return cls(w_out, folded, logit_bias, norm.epsilon, norm.centred, softcap, write)

    def folded(self, w_out: Tensor) -> Tensor:
        """Fold raw writes of other neurons, ``[n, d_model]`` with the residual multiplier, as `fold` does those of `w_out`."""
        w_out = w_out.detach().float().to(self.unembedding.device)
        return self.centre(w_out if self.write_norm is None else w_out * self.write_norm.gain)

    def select(self, neurons: Tensor | slice) -> Readout:
        """The readout of some of the neurons, by index ``[n]`` or as a slice."""
        return self._with_writes(lambda writes: writes[neurons])

    def combine(self, push: Tensor) -> Readout:
        """The readout of one imaginary neuron that stands for all, each activated by ``push`` ``[n_neurons]``; or of several."""
        return self._with_writes(lambda writes: torch.atleast_2d(push @ writes))

    def _with_writes(self, change: Callable[[Tensor], Tensor]) -> Readout:
        norm = self.write_norm and dataclasses.replace(self.write_norm, inputs=change(self.write_norm.inputs))
        return dataclasses.replace(self, w_out=change(self.w_out), write_norm=norm)

    @functools.cached_property
    def biased(self) -> bool:
        """Whether any logit has a bias."""
        return bool(self.logit_bias.any())

    @functools.cached_property
    def gram(self) -> Tensor:
        """``W_Uᵀ W_U`` in float64, ``[d_model, d_model]``: lengths of writes in logit space, and the unembedding's spectrum."""
        gram = torch.zeros(self.d_model, self.d_model, dtype=torch.float64, device=self.unembedding.device)
        for rows in self.unembedding.split(ROWS_PER_CHUNK):
            rows = rows.double()
            gram.addmm_(rows.T, rows)
        return gram

    def centre(self, residual: Tensor) -> Tensor:
        """The part of `residual` ``[..., d_model]`` that the final norm sees, float32."""
        residual = residual.float()
        return residual - residual.mean(dim=-1, keepdim=True) if self.centred else residual

    def norm_scale(self, residual: Tensor) -> Tensor:
        """``sqrt(mean(h²) + ε)`` of a centred residual ``[..., d_model]``: the final norm's denominator, ``[...]``."""
        return (residual.square().mean(dim=-1) + self.epsilon).sqrt()

    def logits(self, residual: Tensor) -> Tensor:
        """Logits ``[..., vocab]`` of a residual ``[..., d_model]``, up to a constant per token."""
        residual = self.centre(residual)
        return self.cap((residual / self.norm_scale(residual)[..., None]) @ self.unembedding.T + self.logit_bias)

    def cap(self, logits: Tensor) -> Tensor:
        """Logits after the softcap, where there is one."""
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def cap_slope(self, capped: Tensor) -> Tensor:
        """Derivative of the softcap at the point where it gives `capped`. Only for a model that has one."""
        assert self.softcap is not None
        return 1 - (capped / self.softcap).square()

    def state(self, residual: Tensor, mlp_output: Tensor | None = None) -> ReadoutState:
        """Work out what `move` needs to know about some tokens.

        Args:
            residual: input of the final norm, ``[tokens, d_model]``.
            mlp_output: input of the write norm, ``[tokens, d_model]``, in a model that has one.
        """
        residual = self.centre(residual)
        sigma = self.norm_scale(residual)[:, None]
        if self.write_norm is None:
            return ReadoutState(residual, sigma, None, None, None)
        if mlp_output is None:
            raise ValueError("this model normalises its MLP's output: give the states of that output too")
        mlp_output = mlp_output.float()
        rho = (mlp_output.square().mean(dim=-1, keepdim=True) + self.write_norm.epsilon).sqrt()
        return ReadoutState(residual, sigma, mlp_output, rho, self.centre(mlp_output / rho * self.write_norm.gain))

    def residual_after(self, state: ReadoutState, change: Tensor) -> Tensor:
        """The (centred) residual ``[tokens, d_model]`` after ``change`` ``[tokens, n_neurons]`` is added to the activations."""
        if self.write_norm is None:
            return state.residual + change @ self.w_out
        assert state.mlp_output is not None
        after = self.state(state.residual, state.mlp_output + change @ self.write_norm.inputs).normed
        assert after is not None
        assert state.normed is not None
        return state.residual - state.normed + after

    def move(self, state: ReadoutState, delta: Tensor, *, paired: bool = False) -> Move:
        """Work out how the logits move when ``delta`` ``[tokens, n_neurons]`` is added to each activation alone.

        Args:
            state: of the tokens.
            delta: what is added.
            paired: whether the readout has one neuron for each token, to which each column of `delta` is added.

        Returns:
            ``[moves, tokens, n_neurons]``. The first is the whole move. In the second the final norm's denominator is frozen.
            A model with a write norm has a third, with both frozen. So the last is always what goes straight to the logits.
        """
        d, residual, sigma = self.d_model, state.residual, state.sigma
        dots = _paired_dots if paired else _dots
        dot, length = dots(residual, self.w_out), self.w_out.square().sum(dim=1, keepdim=paired)
        none = torch.zeros_like(delta)
        if self.write_norm is None:
            growth = (2 * delta * dot + delta.square() * length) / (d * sigma.square())
            alpha, direct = _inverse_root(growth), delta / sigma
            return Move((torch.stack([alpha, none]),), torch.stack([direct * (1 + alpha), direct]))
        assert state.mlp_output is not None
        assert state.rho is not None
        assert state.normed is not None
        inputs, rho, normed = self.write_norm.inputs, state.rho, state.normed
        lengths = inputs.square().sum(dim=1, keepdim=paired)
        growth = (2 * delta * dots(state.mlp_output, inputs) + delta.square() * lengths) / (d * rho.square())
        gamma, straight = _inverse_root(growth), delta / rho
        delta = straight * (1 + gamma)
        growth = 2 * delta * dot + delta.square() * length + 2 * gamma * (residual * normed).sum(-1, keepdim=True)
        growth += gamma.square() * normed.square().sum(-1, keepdim=True) + 2 * gamma * delta * dots(normed, self.w_out)
        alpha = _inverse_root(growth / (d * sigma.square()))
        return Move(
            (torch.stack([gamma * (1 + alpha), gamma, none]), torch.stack([alpha, none, none])),
            torch.stack([delta * (1 + alpha), delta, straight]) / sigma,
        )

    def slope(self, state: ReadoutState) -> Move:
        """Derivative of `move` with respect to ``delta`` at zero, ``[tokens, n_neurons]``."""
        d, residual, sigma = self.d_model, state.residual, state.sigma
        dot = residual @ self.w_out.T
        if self.write_norm is None:
            return Move((-dot / (d * sigma.square()),), (1 / sigma).expand_as(dot))
        assert state.mlp_output is not None
        assert state.rho is not None
        assert state.normed is not None
        gamma = -(state.mlp_output @ self.write_norm.inputs.T) / (d * state.rho.square())
        dot = dot / state.rho + gamma * (residual * state.normed).sum(-1, keepdim=True)
        return Move((gamma, -dot / (d * sigma.square())), (1 / (state.rho * sigma)).expand_as(dot))


class FullOutputs(NamedTuple):
    """The unsteered output at some tokens, over the whole vocabulary."""

    state: ReadoutState
    x: Tensor
    """Logits along the tokens' own directions, ``[K, tokens, vocab]``."""
    y: Tensor
    """Logits before the softcap, ``[tokens, vocab]``."""
    argmax: Tensor
    targets: Tensor
    """Ids of the tokens that follow, ``[tokens]``."""

    def at(self, rows: slice | Tensor) -> FullOutputs:
        """The outputs at some of the tokens."""
        return FullOutputs(self.state.at(rows), self.x[:, rows], self.y[rows], self.argmax[rows], self.targets[rows])

    @classmethod
    def stream(cls, readout: Readout, states: TokenStates) -> Iterator[tuple[FullOutputs, slice]]:
        """Yield the outputs a few tokens at a time, as the size of the vocabulary requires, and which tokens they are.

        The next outputs overwrite the last: the system would take a tenth of the product's time to clear new memory.
        """
        at_once, scratch = max(1, STREAMED_SET // readout.vocab_size), Scratch(readout.unembedding)
        for start in range(0, len(states.targets), at_once):
            rows = slice(start, start + at_once)
            part = states.at(rows)
            state = readout.state(part.residual, part.mlp_output)
            directions = state.directions
            memory = scratch.empty("x", *directions.shape[:-1], readout.vocab_size)
            x = products(directions, readout.unembedding, out=memory)
            y = torch.add(x[-1], readout.logit_bias, out=scratch.empty("y", *x[-1].shape)) if readout.biased else x[-1]
            yield cls(state, x, y, y.argmax(dim=-1), part.targets), rows


def products(directions: Tensor, unembedding: Tensor, out: Tensor | None = None) -> Tensor:
    """``W_U directions``, ``[K, tokens, vocab]``, of directions ``[K, tokens, d_model]``; in `out` if that is given."""
    if directions.device.type != "cpu":
        return torch.matmul(directions, unembedding.T, out=out)
    # Split the product: a CPU's library is up to 1.5 times as fast where the other matrix stays in the cache.
    result = directions.new_empty(*directions.shape[:-1], len(unembedding)) if out is None else out
    rows, of_rows = directions.flatten(0, 1), result.view(-1, len(unembedding))

    def multiply(first: int) -> None:
        columns = slice(first, first + CACHED_ROWS)
        torch.mm(rows, unembedding[columns].T, out=of_rows[:, columns])

    on_all_cores(multiply, range(0, len(unembedding), CACHED_ROWS), rows.device)
    return result


def _dots(states: Tensor, writes: Tensor) -> Tensor:
    """Dot products of every state with every write, ``[tokens, n]``."""
    return states @ writes.T


def _paired_dots(states: Tensor, writes: Tensor) -> Tensor:
    """Dot products of every state with its own write, ``[tokens, 1]``."""
    return (states * writes).sum(dim=1, keepdim=True)


def _inverse_root(growth: Tensor) -> Tensor:
    """``1/sqrt(1 + growth) − 1`` without cancellation."""
    root = (1 + growth).clamp_min(torch.finfo(growth.dtype).tiny).sqrt()
    return -growth / (root * (1 + root))
