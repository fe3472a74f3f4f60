"""Forward passes over a corpus, one batch at a time: the states of the last layer at the positions that count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from confsteer.anatomy import Anatomy, LastLayerStates, input_device
from confsteer.corpus import Batch, Windows


class TokenStates(NamedTuple):
    """The last layer at the kept positions of a batch of windows."""

    activations: Tensor
    """``[tokens, n_neurons]``, in the model's dtype."""
    residual: Tensor
    """``[tokens, d_model]``, in the model's dtype."""
    targets: Tensor
    """Ids of the tokens that follow, ``[tokens]``."""
    window: Tensor
    """Index of each token's window within the batch, ``[tokens]``."""
    read: int
    """Tokens the model read for this, kept or not."""


def stream(
    model: PreTrainedModel, anatomy: Anatomy, windows: Windows, *, batch_size: int, device: torch.device
) -> Iterator[TokenStates]:
    """One forward pass over `windows`. States arrive on `device`; logits are not computed.

    The caller must have put the model in evaluation mode.
    """
    for batch in windows.batches(batch_size):
        yield _last_layer(model, anatomy, batch, device)


def _last_layer(model: PreTrainedModel, anatomy: Anatomy, batch: Batch, device: torch.device) -> TokenStates:
    received: list[LastLayerStates] = []
    inputs_on = input_device(model)
    with torch.no_grad(), anatomy.recording(received.append):
        # The body alone: the unembedding of every position is not needed here.
        model.base_model(
            input_ids=batch.input_ids.to(inputs_on), attention_mask=batch.attention_mask.to(inputs_on), use_cache=False
        )
    (states,) = received
    kept = batch.kept.flatten()
    return TokenStates(
        activations=states.activations[kept.to(states.activations.device)].to(device),
        residual=states.residual[kept.to(states.residual.device)].to(device),
        targets=batch.targets.to(device),
        window=batch.window.to(device),
        read=int(batch.attention_mask.sum()),
    )
