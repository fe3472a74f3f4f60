"""A change at the last layer, as tensors: a steering, and the baselines it is compared with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.edit import NeuronEdit


class Intervention(NamedTuple):
    """A change at the last layer, as tensors that gradients can be taken of.

    Neurons become ``clip(gain · a + bias, low, high)``. A constant is written along the direction that the unembedding reads
    least. The logits are divided by a temperature.
    """

    gain: Tensor
    """``[neurons]``, as are the next three, in the order of `Profile.steerable`."""
    bias: Tensor
    low: Tensor
    high: Tensor
    null_write: Tensor
    """Length of the constant, in units of the residual, a scalar."""
    temperature: Tensor
    """A scalar."""

    @classmethod
    def neutral(cls, neurons: int) -> Intervention:
        """An intervention that changes nothing."""
        zeros, inf = torch.zeros(neurons), torch.full((neurons,), math.inf)
        return cls(torch.ones(neurons), zeros, -inf, inf, torch.zeros(()), torch.ones(()))

    @classmethod
    def of(cls, edit: NeuronEdit, null_write: float = 0.0) -> Intervention:
        """An intervention that is a steering alone."""
        columns = {name: torch.from_numpy(column) for name, column in edit._asdict().items()}
        return cls.neutral(len(edit.gain))._replace(**columns, null_write=torch.tensor(null_write))

    @property
    def leaves_neurons(self) -> bool:
        """Whether no neuron is changed, and no gradient is taken with respect to a change of one."""
        edit = self[:4]
        if any(column.requires_grad for column in edit):
            return False
        return all(
            torch.equal(column.float().cpu(), same) for column, same in zip(edit, self.neutral(len(self.gain)), strict=False)
        )

    @property
    def leaves_residual(self) -> bool:
        """Whether no constant is written, in the sense of `leaves_neurons`."""
        return not self.null_write.requires_grad and float(self.null_write) == 0
