"""The steerings of a step on the device: the edit of every neuron in each, and the steering of each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from confsteer.last_layer.edit import NEUTRAL_EDIT, edited
from confsteer.runtimes.vllm.worker.slots import NEUTRAL


class SteeringTable(nn.Module):
    """Table of steerings. It is a part of the model, so these buffers are moved, saved and captured with it.

    Shapes and addresses never change; only the contents of the buffers do.
    """

    edits: Tensor
    """Gain, bias, low and high of each neuron, per row of the table; float32 ``[4, rows, neurons]``."""
    rows: Tensor
    """Row of the table that each token of a step follows, int64 ``[tokens]``."""

    def __init__(self, neurons: int, *, slots: int, max_tokens: int, device: torch.device) -> None:
        """
        Args:
            neurons: how many.
            slots: rows besides the neutral one.
            max_tokens: most tokens of a step.
            device: device of the model.
        """
        super().__init__()
        edit = torch.tensor(NEUTRAL_EDIT, device=device)
        self.register_buffer("edits", edit[:, None, None].repeat(1, slots + 1, neurons), persistent=False)
        self.register_buffer("rows", torch.full((max_tokens,), NEUTRAL, device=device), persistent=False)

    def steer(self, activations: Tensor, first: int) -> Tensor:
        """Edit activations ``[..., tokens, n]`` of the `n` neurons from `first` on, each token by its row."""
        rows = self.rows.narrow(0, 0, activations.shape[-2])
        gain, bias, low, high = self.edits.narrow(2, first, activations.shape[-1])[:, rows]
        return edited(activations, gain, bias, low, high)

    def write(self, slots: Sequence[int], edits: Tensor) -> None:
        """Put edits ``[4, slots, neurons]`` into rows of the table."""
        self.edits.index_copy_(1, self._sent(torch.tensor(list(slots))), self._sent(edits))

    def point(self, rows: Tensor) -> None:
        """Make the next step's tokens follow `rows`, int64 ``[tokens]`` on the CPU."""
        self.rows[: len(rows)] = self._sent(rows)

    def clear(self) -> None:
        """Make every token of any step follow the neutral row."""
        self.rows.fill_(NEUTRAL)

    def _sent(self, values: Tensor) -> Tensor:
        """Copy to the device, without waiting for it.

        Each call takes a fresh pinned buffer, because the copy may still be under way when the next step is prepared.
        """
        return values.pin_memory().to(self.rows.device, non_blocking=True) if self.rows.is_cuda else values
