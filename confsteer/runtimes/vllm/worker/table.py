"""The steerings of a step on the device, and the edit: what becomes part of the compiled graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from confsteer.last_layer.edit import NEUTRAL_EDIT, edited
from confsteer.runtimes.vllm.worker.slots import NEUTRAL


class SteeringTable(nn.Module):
    """Part of the model, so that whatever moves, saves or captures a model does it to these buffers too.

    Shapes and addresses never change, only what the buffers hold.
    """

    neurons: Tensor
    """Columns of the activations that are edited, int64 ``[neurons]``."""
    edits: Tensor
    """Gain, bias, low and high of each, per row of the table; float32 ``[4, rows, neurons]``."""
    rows: Tensor
    """Row of the table that each token of a step follows, int64 ``[tokens]``."""

    def __init__(self, neurons: Tensor, *, slots: int, max_tokens: int) -> None:
        """
        Args:
            neurons: see above; they say which device.
            slots: rows besides the neutral one.
            max_tokens: of a step.
        """
        super().__init__()
        edit = torch.tensor(NEUTRAL_EDIT, device=neurons.device)
        self.register_buffer("neurons", neurons, persistent=False)
        self.register_buffer("edits", edit[:, None, None].repeat(1, slots + 1, len(neurons)), persistent=False)
        self.register_buffer("rows", torch.full((max_tokens,), NEUTRAL, device=neurons.device), persistent=False)

    def forward(self, activations: Tensor) -> Tensor:
        """Activations ``[..., tokens, n]`` with those of the neurons steered, each token by its row."""
        gain, bias, low, high = self.edits[:, self.rows.narrow(0, 0, activations.shape[-2])]
        selected = activations.index_select(-1, self.neurons)
        return activations.index_copy(-1, self.neurons, edited(selected, gain, bias, low, high))

    def write(self, slots: Sequence[int], edits: Tensor) -> None:
        """Put edits ``[4, slots, neurons]`` into rows of the table."""
        self.edits.index_copy_(1, self._sent(torch.tensor(list(slots))), self._sent(edits))

    def point(self, rows: Tensor) -> None:
        """Have the next step's tokens follow `rows`, int64 ``[tokens]`` on the CPU."""
        self.rows[: len(rows)] = self._sent(rows)

    def clear(self) -> None:
        """Have every token of any step follow the neutral row."""
        self.rows.fill_(NEUTRAL)

    def _sent(self, values: Tensor) -> Tensor:
        """On the device, without waiting for it.

        A fresh pinned buffer each time: the copy may still be under way when the step after is prepared.
        """
        return values.pin_memory().to(self.rows.device, non_blocking=True) if self.rows.is_cuda else values
