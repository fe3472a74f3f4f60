"""Forward passes over a corpus, one batch at a time: the states of the last layer at the positions that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from confsteer.anatomy import Anatomy, LastLayerStates, input_device
from confsteer.corpus import Windows
from confsteer.discovery.effects import TokenStates


def stream(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Windows,
    *,
    batch_size: int,
    device: torch.device,
    on_read: Callable[[int], object] = lambda tokens: None,
) -> Iterator[TokenStates]:
    """One forward pass over `windows`, `batch_size` at a time; logits are not computed.

    The caller must have put the model in evaluation mode.

    Args:
        model: the model.
        anatomy: where to look.
        windows: the text.
        batch_size: windows per forward pass.
        device: where the states go.
        on_read: called with the number of tokens read after each batch was used.
    """
    inputs_on = input_device(model)
    for batch in windows.batches(batch_size):
        received: list[LastLayerStates] = []
        with torch.no_grad(), anatomy.recording(received.append):
            # The body alone: the unembedding of every position is not needed here.
            model.base_model(
                input_ids=batch.input_ids.to(inputs_on), attention_mask=batch.attention_mask.to(inputs_on), use_cache=False
            )
        (states,) = received
        kept = batch.kept.flatten().to(states.residual.device)
        yield TokenStates(
            activations=states.activations[kept].to(device),
            residual=states.residual[kept].to(device),
            targets=batch.targets.to(device),
            window=batch.window.to(device),
        )
        on_read(int(batch.attention_mask.sum()))
