"""Every intervention on a text in a few numbers per token, so that one product over the vocabulary serves them all.

With the directions of `confsteer.last_layer.readout` an intervention's logits, before softcap and temperature, are

    y' = Σ_k own_k · W_U directions_k + Σ_i neurons_i · W_U w_i + null · W_U d + b

The token's own directions are ``h/σ``, and ``n/σ`` where the MLP's output is normalised. ``w_i`` are the writes of the
steered neurons and ``d`` is the null direction. Only the coefficients depend on the intervention. They follow from dot
products, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.edit import change_of
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.states import TokenStates, join_rows, rows_of

TOKENS_AT_ONCE = 4096
"""Tokens whose residuals are copied at a time, to take dot products of them."""


class Coordinates(NamedTuple):
    """Coefficients of an intervention at some tokens, float32; see the module."""

    own: Tensor
    """``[tokens, 1 or 2]``, of the last ones of the own directions. The residual's coefficient is the last."""
    neurons: Tensor | None
    """``[tokens, neurons]``; None if none of them is changed."""
    null: Tensor | None
    """``[tokens]``; None if nothing is written along the null direction."""
    cooling: Tensor
    """One over the temperature, ``[tokens]``."""

    def at(self, rows: slice | Tensor) -> Coordinates:
        """The coordinates of some of the tokens."""
        return rows_of(self, rows)

    def write(self, writes: Writes) -> Tensor:
        """Coefficients of all `writes`, zeros where nothing is changed, ``[tokens, neurons + 1]``."""
        tokens, neurons = len(self.own), len(writes.vectors) - 1
        changed = self.own.new_zeros(tokens, neurons) if self.neurons is None else self.neurons
        constant = self.own.new_zeros(tokens) if self.null is None else self.null
        return torch.cat([changed, constant[:, None]], dim=1)

    @classmethod
    def join(cls, parts: Sequence[Coordinates], order: Tensor) -> Coordinates:
        """Join the coordinates of several sets of tokens, then put them in an order ``[tokens]``. All change the same things."""
        return join_rows(parts).at(order)


class Writes:
    """Vectors that an intervention can add to the residual of any token: the writes of the neurons and the null direction."""

    def __init__(self, readout: Readout, null_direction: Tensor) -> None:
        """
        Args:
            readout: the last layer, of the neurons that can be changed.
            null_direction: unit vector, ``[d_model]``.
        """
        self.readout = readout
        self.vectors = torch.cat([readout.w_out, readout.centre(null_direction)[None]])
        """The neurons' and, last, the null direction, ``[neurons + 1, d_model]``."""
        self.gram = self.vectors.double() @ self.vectors.double().T

    @functools.cached_property
    def logits(self) -> Tensor:
        """Logits along the vectors, ``[neurons + 1, vocab]``."""
        return self.vectors @ self.readout.unembedding.T

    @functools.cached_property
    def by_token(self) -> Tensor:
        """The same by token of the vocabulary, contiguous ``[vocab, neurons + 1]``, to look some of them up."""
        return self.logits.T.contiguous()


class Geometry(NamedTuple):
    """Dot products of a text's states with each other and with the writes, float64."""

    own: Tensor
    """Products among the own directions, before the division by the final norm's denominator, ``[tokens, K, K]``."""
    across: Tensor
    """Products of the own directions with the writes, ``[tokens, K, neurons + 1]``."""
    sigma: Tensor
    """The final norm's denominator, ``[tokens]``."""
    rho: Tensor | None
    """The write norm's denominator, ``[tokens]``. This and the next are None in a model without one."""
    inputs: Tensor | None
    """Products of the write norm's input with the neurons' writes to it, ``[tokens, neurons]``."""

    @classmethod
    def of(cls, readout: Readout, writes: Writes, states: TokenStates) -> Geometry:
        """Take the dot products."""
        parts: list[Geometry] = []
        for start in range(0, len(states.targets), TOKENS_AT_ONCE):
            few = states.at(slice(start, start + TOKENS_AT_ONCE))
            state = readout.state(few.residual, few.mlp_output)
            own = state.residual[:, None] if state.normed is None else torch.stack([state.normed, state.residual], dim=1)
            products = (own @ own.transpose(1, 2)).double()
            inputs = rho = None
            if readout.write_norm is not None:
                assert state.rho is not None
                assert state.mlp_output is not None
                rho, inputs = state.rho[:, 0].double(), (state.mlp_output @ readout.write_norm.inputs.T).double()
            sigma = (products[:, -1, -1] / readout.d_model + readout.epsilon).sqrt()
            parts.append(cls(products, (own @ writes.vectors.T).double(), sigma, rho, inputs))
        return join_rows(parts)

    def at(self, rows: slice | Tensor) -> Geometry:
        """The dot products of some of the tokens."""
        return rows_of(self, rows)

    def coordinates(self, readout: Readout, writes: Writes, states: TokenStates, intervention: Intervention) -> Coordinates:
        """Work out the coefficients of an intervention.

        Args:
            readout: the last layer.
            writes: what can be added to the residual.
            states: the activations of the neurons that can be changed.
            intervention: the change. The coefficients are differentiable with respect to its tensors.
        """
        tokens, device, d = len(states.activations), states.activations.device, readout.d_model
        *edit, null_write, temperature = (column.to(device) for column in intervention)
        cooling = (1 / temperature.float()).expand(tokens)
        if intervention.leaves_neurons and intervention.leaves_residual:
            return Coordinates(torch.ones(tokens, 1, device=device), None, None, cooling)
        change = change_of(states, edit).double()
        along = torch.ones(tokens, 1, dtype=torch.float64, device=device)
        if readout.write_norm is not None:
            change, gamma = self._through_write_norm(readout, change)
            along = torch.cat([gamma[:, None], along], dim=1)
        write = torch.cat([change, null_write.double().expand(tokens, 1)], dim=1)
        # Take the squared length of the new residual: the final norm's denominator follows from it.
        square = ((self.own @ along[:, :, None])[:, :, 0] * along).sum(dim=1)
        square = square + 2 * ((self.across @ write[:, :, None])[:, :, 0] * along).sum(dim=1)
        square = square + ((write @ writes.gram) * write).sum(dim=1)
        sigma = (square.clamp_min(0) / d + readout.epsilon).sqrt()
        own = (along * (self.sigma / sigma)[:, None]).float()
        write = (write / sigma[:, None]).float()
        if intervention.leaves_neurons:
            return Coordinates(own[:, -1:], None, write[:, -1], cooling)
        return Coordinates(own, write[:, :-1], None if intervention.leaves_residual else write[:, -1], cooling)

    def _through_write_norm(self, readout: Readout, change: Tensor) -> tuple[Tensor, Tensor]:
        """Turn changes of activations into what they add along the writes and along the norm's old output."""
        assert readout.write_norm is not None
        assert self.rho is not None
        assert self.inputs is not None
        inputs = readout.write_norm.inputs.double()
        growth = (2 * (change * self.inputs).sum(dim=1) + ((change @ (inputs @ inputs.T)) * change).sum(dim=1)) / readout.d_model
        rho = (self.rho.square() + growth).clamp_min(readout.write_norm.epsilon).sqrt()
        return change / rho[:, None], self.rho / rho - 1


class Plan:
    """Logits of one intervention, made from those along the tokens' own directions."""

    def __init__(self, readout: Readout, writes: Writes, coordinates: Coordinates) -> None:
        """
        Args:
            readout: the last layer.
            writes: what can be added to the residual.
            coordinates: of the intervention at all tokens.
        """
        self._softcap, self._cap = readout.softcap is not None, readout.cap
        self._cooling = coordinates.cooling[:, None]
        self._own = coordinates.own
        self._bias = readout.logit_bias if readout.biased else None
        self._write: Tensor | None = None
        # Take the writes that any token needs, and leave out the others.
        write = coordinates.write(writes)
        used = write.any(dim=0).nonzero()[:, 0]
        if len(used):
            self._write = write[:, used]
            self._logits = writes.logits if len(used) == len(writes.logits) else writes.logits[used]
        if not self._softcap:
            # Divide the few coefficients by the temperature, and not every logit.
            self._own = self._own * self._cooling
            self._write = None if self._write is None else self._write * self._cooling

    def logits(self, rows: slice, x: Tensor) -> Tensor:
        """Compute the logits ``[rows, vocab]`` of some tokens, as a new tensor.

        Args:
            rows: which they are.
            x: logits along their own directions, ``[K, rows, vocab]``, as `confsteer.last_layer.readout.products` gives them.
        """
        own = self._own[rows]
        x = x[-own.shape[1] :]
        if self._write is None:
            y = x[-1] * own[:, -1:]
        else:
            y = self._write[rows] @ self._logits
            y.addcmul_(x[-1], own[:, -1:])
        for k in range(len(x) - 1):
            y.addcmul_(x[k], own[:, k, None])
        if self._softcap:
            y = self._cap(y if self._bias is None else y.add_(self._bias)).mul_(self._cooling[rows])
        elif self._bias is not None:
            y.addcmul_(self._bias, self._cooling[rows])
        return y
