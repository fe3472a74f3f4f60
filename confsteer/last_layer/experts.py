"""A mixture of experts as the last layer: its neurons in one row, and the tokens that each is active on.

A routed expert works on the tokens that the router sends to it, with a routing weight ``r``. What the layer adds to the residual
is ``Σ r a_i w_i`` over the neurons of the chosen experts. So a neuron's activation is the factor of its write, ``r a``, and 0 on
all other tokens. A shared expert works on all tokens. If it has a gate, the gate is its routing weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.states import TokenStates

SHARED = "shared"
"""The shared expert, in a name, in place of an expert's number."""


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture of experts. Neurons are counted expert by expert, those of the shared expert last."""

    number: int
    """Routed experts."""
    units: int
    """Neurons of each routed expert."""
    shared: int
    """Neurons of the shared expert; 0 if there is none."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        if self.number < 1 or self.units < 1 or self.shared < 0:
            raise ValueError(f"{self.number} experts of {self.units} neurons and {self.shared} shared ones are no layer")

    def __str__(self) -> str:
        shared = f" and a shared one of {self.shared:,}" if self.shared else ""
        return f"{self.number:,} experts of {self.units:,} neurons{shared}"

    @property
    def n_routed(self) -> int:
        """Neurons of all routed experts."""
        return self.number * self.units

    @property
    def n_neurons(self) -> int:
        return self.n_routed + self.shared

    @property
    def groups(self) -> list[slice]:
        """Neurons that are active on the same tokens: those of each routed expert, then of the shared one if there is one."""
        routed = [slice(first, first + self.units) for first in range(0, self.n_routed, self.units)]
        return [*routed, slice(self.n_routed, self.n_neurons)] if self.shared else routed

    def name(self, neuron: int) -> str:
        """Name a neuron by its expert and its number within: ``3.17``, or ``shared.17``."""
        expert, unit = divmod(neuron, self.units)
        return f"{expert}.{unit}" if neuron < self.n_routed else f"{SHARED}.{neuron - self.n_routed}"


class Part(NamedTuple):
    """Neurons that are active on the same tokens, and these tokens."""

    neurons: slice
    rows: slice | Tensor
    """The tokens among those given."""
    states: TokenStates
    """States at these tokens, with the activations of these neurons, ``[tokens, n]``."""


def parts(experts: Experts | None, states: TokenStates) -> Iterator[Part]:
    """Split a layer into neurons that are active on the same tokens, so that work follows the active ones.

    Args:
        experts: sizes of the mixture; None for a dense MLP, all of whose neurons are active on all tokens.
        states: of some tokens, with the activations of all neurons.
    """
    if experts is None:
        yield Part(slice(None), slice(None), states)
        return
    routed, shared = _slots(experts, states)
    assert states.experts is not None
    for number, neurons in enumerate(experts.groups):
        if number < experts.number:
            rows, slot = (states.experts == number).nonzero(as_tuple=True)
            activations = routed[rows, slot]
        else:
            rows, activations = torch.arange(len(shared), device=shared.device), shared
        yield Part(neurons, rows, states.at(rows)._replace(activations=activations, experts=None))


def of_neurons(experts: Experts | None, states: TokenStates, neurons: Tensor) -> TokenStates:
    """States with the activations of some neurons only, and where they are active.

    Args:
        experts: sizes of the mixture; None for a dense MLP.
        states: of some tokens, with the activations of all neurons.
        neurons: indices ``[n]``.
    """
    if experts is None:
        return states._replace(activations=states.activations[:, neurons])
    routed, shared = _slots(experts, states)
    assert states.experts is not None
    is_shared = neurons >= experts.n_routed
    expert, unit = neurons // experts.units, neurons % experts.units
    in_slot = states.experts[:, :, None] == expert  # [tokens, slots, n]
    active = in_slot.any(dim=1) | is_shared
    activations = torch.where(in_slot, routed[:, :, unit], 0).sum(dim=1)
    activations[:, is_shared] = shared[:, neurons[is_shared] - experts.n_routed]
    return states._replace(activations=activations, active=active, experts=None)


def _slots(experts: Experts, states: TokenStates) -> tuple[Tensor, Tensor]:
    """Activations of the routed experts, ``[tokens, slots, units]``, and of the shared one, ``[tokens, shared]``."""
    assert states.experts is not None
    split = states.experts.shape[1] * experts.units
    return states.activations[:, :split].unflatten(1, (-1, experts.units)), states.activations[:, split:]
