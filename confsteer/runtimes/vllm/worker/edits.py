"""The edits at each place in the model, which become part of the compiled graph. They know nothing of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from confsteer.runtimes.vllm.worker.table import SteeringTable


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    """The activation function of gpt-oss, with the constants of vLLM's kernels."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "gelu_tanh": lambda gate, up: gelu(gate, approximate="tanh") * up,
    "swigluoai": _swiglu_oai,
}
"""Activation functions of gated MLPs, by vLLM's names."""


class Rows(NamedTuple):
    """Weights of some neurons of a gated MLP."""

    gate: Tensor
    """``[neurons, d_model]``, as is the next."""
    up: Tensor
    gate_bias: Tensor | None
    """``[neurons]``, as is the next."""
    up_bias: Tensor | None
    writes: Tensor
    """Writes to the MLP's output, ``[neurons, d_model]``."""


class ProjectionEdit(nn.Module):
    """The edit of neurons whose activations go into a projection."""

    units: Tensor
    """Columns of the activations, int64 ``[neurons]``."""

    def __init__(self, table: SteeringTable, first: int, units: Tensor) -> None:
        """
        Args:
            table: steerings to follow.
            first: column of the first neuron in the table. The others follow it.
            units: see above.
        """
        super().__init__()
        self.table, self.first = table, first
        self.register_buffer("units", units, persistent=False)

    def forward(self, activations: Tensor) -> Tensor:
        """Edit activations ``[..., tokens, n]``: the neurons of each token by its row."""
        selected = activations.index_select(-1, self.units)
        return activations.index_copy(-1, self.units, self.table.steer(selected, self.first))


class OutputEdit(nn.Module):
    """The edit of neurons inside a kernel that cannot be opened, by its input and output.

    Their activations are computed again from the input. The effect of the rule on them is added to the output. The rule acts on
    the factor of a neuron's write: its own activation times a weight of the router or of a gate. Where a neuron is not active,
    it is not changed.
    """

    gate: Tensor
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    writes: Tensor

    def __init__(self, table: SteeringTable, first: int, rows: Rows, activation: str) -> None:
        """
        Args:
            table: steerings to follow.
            first: see `ProjectionEdit`.
            rows: weights of the neurons.
            activation: a name in `ACTIVATIONS`.
        """
        super().__init__()
        self.table, self.first = table, first
        self._activate = ACTIVATIONS[activation]
        for name, tensor in rows._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def change(self, inputs: Tensor, weights: Tensor, active: Tensor | None) -> Tensor:
        """Compute what is added to the output, float32 ``[tokens, d_model]``.

        Args:
            inputs: inputs of the kernel, ``[tokens, d_model]``.
            weights: weights of each neuron's own activation, float32 ``[tokens, neurons]``.
            active: where neurons are active, bool ``[tokens, neurons]``; None for everywhere.
        """
        gate, up = linear(inputs, self.gate, self.gate_bias), linear(inputs, self.up, self.up_bias)
        before = self._activate(gate.float(), up.float()) * weights
        change = self.table.steer(before, self.first) - before
        return (change if active is None else torch.where(active, change, 0)) @ self.writes.float()


class RoutedEdit(OutputEdit):
    """The edit of neurons of routed experts."""

    experts: Tensor
    """Expert of each neuron, int64 ``[neurons]``."""
    everywhere: Tensor
    """Whether all neurons count as active on every token, a bool scalar. The proof needs it: routing may pass them by."""

    def __init__(
        self, table: SteeringTable, first: int, rows: Rows, activation: str, *, experts: Tensor, output_scale: float
    ) -> None:
        """
        Args:
            table: see `OutputEdit`, as for the next three.
            first: see table.
            rows: see table.
            activation: see table.
            experts: see above.
            output_scale: factor of the experts' output that is applied later, beyond the routing weights.
        """
        super().__init__(table, first, rows, activation)
        self._output_scale = output_scale
        self.register_buffer("experts", experts, persistent=False)
        self.register_buffer("everywhere", torch.zeros((), dtype=torch.bool, device=experts.device), persistent=False)

    def forward(self, inputs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Compute what is added to the experts' output before it is scaled, float32 ``[tokens, d_model]``.

        Args:
            inputs: inputs of the experts, ``[tokens, d_model]``.
            weights: routing weights, ``[tokens, slots]``.
            chosen: experts that each token is routed to, ``[tokens, slots]``.
        """
        here = chosen[:, :, None] == self.experts
        of_neurons = torch.where(here, weights[:, :, None].float(), 0).sum(dim=1) * self._output_scale
        return self.change(inputs, of_neurons, here.any(dim=1) | self.everywhere) / self._output_scale


class DirectionEdit(nn.Module):
    """The edit along a null direction: an imaginary neuron, never active, that writes right before the final norm."""

    direction: Tensor
    """float32 ``[d_model]``."""

    def __init__(self, table: SteeringTable, first: int, direction: Tensor) -> None:
        """
        Args:
            table: steerings to follow.
            first: see `ProjectionEdit`.
            direction: see above.
        """
        super().__init__()
        self.table, self.first = table, first
        self.register_buffer("direction", direction, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Add the constant of each token's row to the input of the final norm, ``[..., tokens, d_model]``."""
        length = self.table.steer(torch.zeros_like(hidden_states[..., :1], dtype=torch.float32), self.first)
        return (hidden_states.float() + length * self.direction).to(hidden_states.dtype)
