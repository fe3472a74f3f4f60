"""The states of the last layer at some tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

States = TypeVar("States", bound=NamedTuple)


def rows_of(states: States, rows: slice | Tensor) -> States:
    """Take some rows of every tensor in a named tuple. None stays None."""
    return states._make(None if field is None else field[rows] for field in states)


def join_rows(parts: Sequence[States]) -> States:
    """Put the rows of several named tuples after each other; what is None in the first is None."""
    return parts[0]._make(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True))


class TokenStates(NamedTuple):
    """States that a model left in its last layer at some tokens."""

    activations: Tensor
    """Input of the last MLP's output projection, ``[tokens, n_neurons]``.

    In a mixture of experts it is the factor of each neuron's write, ``[tokens, slots · units + shared]``. The experts that a
    token is routed to come one after the other, then the shared one.
    """
    residual: Tensor
    """Input of the final norm, ``[tokens, d_model]``."""
    mlp_output: Tensor | None
    """Input of the write norm, ``[tokens, d_model]``, in a model that has one."""
    targets: Tensor
    """Ids of the tokens that follow, ``[tokens]``."""
    window: Tensor
    """Number of the window that each token is in, ``[tokens]``."""
    experts: Tensor | None = None
    """Experts that each token is routed to, ``[tokens, slots]``; None in a dense model."""
    active: Tensor | None = None
    """Whether the token is routed to each neuron, bool ``[tokens, n]``; None: to all. Other activations do not count."""

    def at(self, rows: slice | Tensor) -> TokenStates:
        """The states of some of the tokens."""
        return rows_of(self, rows)

    def to(self, device: torch.device) -> TokenStates:
        """The states on a device."""
        return self._replace(**{name: tensor.to(device) for name, tensor in self._asdict().items() if tensor is not None})
