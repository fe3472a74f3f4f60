"""Steering the neurons of a mixture of experts in a transformers model, with any kernel that runs the experts.

The rule acts on the factor of a neuron's write: its own activation times the routing weight, as in discovery. So a dial pushes
the residual by the same amount on every token that is routed to the neuron. Bounds and shifts are in the profile's units. On
tokens that are not routed to a neuron, it adds nothing and is not changed.

    output' = output + Σ (a'_i − a_i) w_i        a_i = routing weight · own activation

The output is that of the routed experts' module. A shared expert without a gate is steered as a dense MLP.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from confsteer.model.experts import MixtureAnatomy, Routed, add_to_output, neuron_activations, shared_activations
from confsteer.profile.profile import Profile


class Steerer(Protocol):
    """The part of `confsteer.runtimes.transformers.Steerer` that steering experts needs."""

    profile: Profile
    _table: Tensor
    _watch: Any

    def _after(self, before: Tensor, table: Tensor) -> Tensor: ...

    def _move(self, device: torch.device) -> None: ...


def steer_experts(anatomy: MixtureAnatomy, steerer: Steerer, stack: contextlib.ExitStack) -> None:
    """Steer the neurons of a profile until `stack` is closed.

    Args:
        anatomy: of the model.
        steerer: what it is asked for.
        stack: the stack that removes the hooks.
    """
    n_routed = anatomy.experts.n_routed
    indices = [neuron.index for neuron in steerer.profile.steerable]
    shared = [column for column, index in enumerate(indices) if index >= n_routed]
    routed = [column for column, index in enumerate(indices) if index < n_routed]
    edit = ExpertEdit(anatomy, steerer, routed, shared if anatomy.shared_gate is not None else [])
    stack.callback(anatomy.down_proj.register_forward_hook(edit.of_output, with_kwargs=True).remove)
    if shared and anatomy.shared_gate is None:
        assert anatomy.shared is not None
        of_shared = SharedEdit(steerer, shared, [indices[column] - n_routed for column in shared])
        stack.callback(anatomy.shared.register_forward_pre_hook(of_shared.of_input).remove)


class SharedEdit:
    """The edit of a shared expert's neurons, before its output projection."""

    def __init__(self, steerer: Steerer, columns: list[int], units: list[int]) -> None:
        """
        Args:
            steerer: what is asked for.
            columns: columns of the neurons in its table.
            units: numbers of the neurons in the expert.
        """
        self._steerer = steerer
        self._columns, self._units = torch.tensor(columns), torch.tensor(units)

    def of_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Edit the activations, ``[…, units]``."""
        activations: Tensor = args[0]
        units, columns = self._units.to(activations.device), self._columns.to(activations.device)
        table = self._steerer._table.to(activations.device)[:, :, columns]
        after = self._steerer._after(activations.index_select(-1, units), table)
        return (activations.index_copy(-1, units, after), *args[1:])


class ExpertEdit:
    """The edit of neurons in routed experts, and in a shared expert with a gate, added after the routed experts."""

    def __init__(self, anatomy: MixtureAnatomy, steerer: Steerer, routed: list[int], shared: list[int]) -> None:
        """
        Args:
            anatomy: of the model.
            steerer: what is asked for.
            routed: columns of the routed experts' neurons in its table.
            shared: columns of the shared expert's neurons.
        """
        self._anatomy, self._steerer = anatomy, steerer
        experts, neurons = anatomy.experts, [neuron.index for neuron in steerer.profile.steerable]
        self._pairs = [divmod(neurons[column], experts.units) for column in routed]
        # Leave inference mode: tensors made in it could not be used outside.
        with torch.inference_mode(False):
            self._columns = torch.tensor([*routed, *shared], dtype=torch.long)
            self._experts, self._units = torch.tensor(self._pairs, dtype=torch.long).reshape(-1, 2).T
            self._shared = torch.tensor([neurons[column] - experts.n_routed for column in shared], dtype=torch.long)

    def of_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the effect of the edit to the output of the experts' module."""
        self._steerer._watch.reach()
        if not len(self._columns):
            return output
        device = output.device
        if self._columns.device != device:
            with torch.inference_mode(False):
                moved = (tensor.to(device) for tensor in (self._columns, self._experts, self._units, self._shared))
                self._columns, self._experts, self._units, self._shared = moved
        before, active = self._activations(module, Routed.of(module, args, kwargs))
        table = self._steerer._table.to(device)[:, :, self._columns]
        change = torch.where(active, self._steerer._after(before, table) - before, 0)
        writes = self._anatomy.some_writes(self._experts, self._units, self._shared)
        return add_to_output(module, output, change @ writes.to(change))

    def _activations(self, module: nn.Module, routed: Routed) -> tuple[Tensor, Tensor]:
        """Compute the factors of the writes, float32 ``[tokens, n]``, and where they are active, bool ``[tokens, n]``."""
        before, active = [], []
        if self._pairs:
            own = neuron_activations(module, routed, self._pairs)
            chosen = routed.experts[:, :, None] == self._experts
            before.append(own.float() * torch.where(chosen, routed.weights[:, :, None].float(), 0).sum(dim=1))
            active.append(chosen.any(dim=1))
        if len(self._shared):
            own, gate = shared_activations(self._anatomy, routed.inputs, self._shared)
            before.append(own.float() * gate.float())
            active.append(torch.ones_like(own, dtype=torch.bool))
        return torch.cat(before, dim=1), torch.cat(active, dim=1)
