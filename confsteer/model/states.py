"""Forward passes over texts, one batch at a time: the states of the last layer at the positions that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from confsteer.distributed import SINGLE_PROCESS, Process
from confsteer.last_layer.states import TokenStates, rows_of
from confsteer.model.anatomy import Anatomy, LastLayerStates
from confsteer.model.locate import input_device
from confsteer.text.windows import WindowBatch, Windows, check_ids

BATCH_SIZE = 4
"""Windows per forward pass: about a thousand tokens, enough to keep matrix products busy."""
KEPT_BYTES = 2**30
"""States up to this size are kept for the next pass over the text unless told otherwise; the model runs again for the rest."""


class Recording:
    """The states of a text, to be read more than once.

    The caller must have put the model in evaluation mode. Logits are not computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        windows: Windows,
        device: torch.device,
        process: Process = SINGLE_PROCESS,
        room: int = KEPT_BYTES,
    ) -> None:
        """
        Args:
            model: the model.
            anatomy: where to look.
            windows: the text.
            device: where the states go.
            process: this one, which reads every ``world_size``-th batch.
            room: bytes of states to keep.
        """
        self.model, self.anatomy, self.windows, self.device, self.process = model, anatomy, windows, device, process
        self._kept: dict[int, TokenStates] = {}
        self._room = room

    def read(self, on_read: Callable[[int], object] = lambda tokens: None, *, start: int = 0) -> Iterator[TokenStates]:
        """One pass over the text, a batch at a time.

        Args:
            on_read: called with the number of tokens read after each batch was used, and of each that is passed over.
            start: how many batches to pass over, without running the model.
        """
        mine = islice(self.windows.batches(BATCH_SIZE), self.process.rank, None, self.process.world_size)
        for position, batch in enumerate(mine):
            if position >= start:
                states = self._kept.get(position)
                if states is None:
                    states = self._run(batch)
                    if (size := _size(states)) <= self._room:
                        self._kept[position] = states
                        self._room -= size
                yield states
            on_read(int(batch.attention_mask.sum()))

    def _run(self, batch: WindowBatch) -> TokenStates:
        states, _ = _forward(self.model, self.anatomy, batch.input_ids, batch.attention_mask, use_cache=False)
        kept = batch.kept.flatten().to(states.residual.device)
        return TokenStates(
            activations=states.activations[kept].to(self.device),
            residual=states.residual[kept].to(self.device),
            mlp_output=None if states.mlp_output is None else states.mlp_output[kept].to(self.device),
            targets=batch.targets.to(self.device),
            window=batch.window.to(self.device),
        )


def _forward(
    model: PreTrainedModel, anatomy: Anatomy, input_ids: Tensor, attention_mask: Tensor, **cache: Any
) -> tuple[LastLayerStates, Any]:
    """What one pass leaves in the last layer, and what the model's body returns."""
    check_ids(input_ids, anatomy.vocab_size)
    inputs_on = input_device(model)
    received: list[LastLayerStates] = []
    with torch.no_grad(), anatomy.recording(received.append):
        # The body alone: the unembedding of every position is not needed here.
        output = model.base_model(input_ids=input_ids.to(inputs_on), attention_mask=attention_mask.to(inputs_on), **cache)
    (states,) = received
    return states, output


def _size(states: TokenStates) -> int:
    return sum(field.nbytes for field in states if field is not None)


def in_groups(batches: Iterable[TokenStates], at_least: int) -> Iterator[list[TokenStates]]:
    """Gather batches until they have `at_least` tokens together; the last group may have fewer."""
    waiting: list[TokenStates] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(b.targets) for b in waiting) >= at_least:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def join_batches(batches: list[TokenStates]) -> TokenStates:
    """Make one batch of several, their windows numbered through."""
    first = torch.tensor([0, *(int(b.window.max()) + 1 if len(b.window) else 0 for b in batches[:-1])]).cumsum(0).tolist()
    numbered = [b._replace(window=b.window + start) for b, start in zip(batches, first, strict=True)]
    return _concatenate(numbered)


def _concatenate(batches: list[TokenStates]) -> TokenStates:
    return TokenStates._make(None if column[0] is None else torch.cat(column) for column in zip(*batches, strict=True))


def record(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Windows,
    neurons: Tensor,
    device: torch.device,
    on_read: Callable[[int], object] = lambda tokens: None,
) -> TokenStates:
    """The states of a whole text in memory: of the activations those of some neurons, ``d_model`` numbers a token besides.

    The caller must have put the model in evaluation mode.

    Args:
        model: the model.
        anatomy: where to look.
        windows: the text; ``window`` of the states counts through it.
        neurons: indices ``[n]`` of the neurons whose activations to keep.
        device: where the states go.
        on_read: see `Recording.read`.
    """
    kept = []
    for first, batch in enumerate(Recording(model, anatomy, windows, device, room=0).read(on_read)):
        activations = batch.activations[:, neurons.to(device)]
        kept.append(batch._replace(activations=activations, window=batch.window + first * BATCH_SIZE))
    return _concatenate(kept)


def record_continuations(
    model: PreTrainedModel,
    anatomy: Anatomy,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    neurons: Tensor,
    device: torch.device,
    on_read: Callable[[int], object] = lambda sequences: None,
) -> TokenStates:
    """The states at the positions that predict the tokens of continuations.

    A context runs once, however many continuations it has: they run as one batch on its keys and values.
    The caller must have put the model in evaluation mode.

    Args:
        model: the model.
        anatomy: where to look.
        sequences: ids of a context and of its continuation, a token or more each; ``window`` of the states counts through
            them, and is not in order where sequences of one context are apart.
        neurons: indices ``[n]`` of the neurons whose activations to keep.
        device: where the states go.
        on_read: called with a number of sequences after these were read.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(sequences):
        by_context.setdefault(tuple(context), []).append(i)
    kept: list[TokenStates] = []
    for context, members in by_context.items():
        continuations = [torch.tensor(sequences[i][1]) for i in members]
        kept.extend(
            TokenStates(
                activations=states.activations[:, neurons.to(states.activations.device)].to(device),
                residual=states.residual.to(device),
                mlp_output=None if states.mlp_output is None else states.mlp_output.to(device),
                targets=targets.to(device),
                window=torch.tensor(members, device=device)[window.to(device)],
            )
            for states, targets, window in _continue(model, anatomy, torch.tensor([context]), continuations)
        )
        on_read(len(members))
    return _concatenate(kept)


def _continue(
    model: PreTrainedModel, anatomy: Anatomy, context: Tensor, continuations: list[Tensor]
) -> Iterator[tuple[LastLayerStates, Tensor, Tensor]]:
    """States, the token that each predicts, and the continuation it is of: first tokens, then the rest, padded on the right."""
    number, lengths = len(continuations), torch.tensor([len(one) - 1 for one in continuations])
    states, output = _forward(model, anatomy, context, torch.ones_like(context), use_cache=True)
    last = torch.full((number,), context.shape[1] - 1)
    yield _at(states, last), torch.stack([one[0] for one in continuations]), torch.arange(number)
    if int(lengths.max()) == 0:
        return
    cache = output.past_key_values
    # As beam search does it, which every kind of cache knows.
    cache.reorder_cache(torch.zeros(number, dtype=torch.long))
    input_ids = pad_sequence([one[:-1] for one in continuations], batch_first=True)
    inside = torch.arange(input_ids.shape[1]) < lengths[:, None]
    mask = torch.cat([torch.ones(number, context.shape[1], dtype=torch.long), inside.long()], dim=1)
    states, _ = _forward(model, anatomy, input_ids, mask, past_key_values=cache, use_cache=True)
    yield _at(states, inside.flatten().nonzero()[:, 0]), torch.cat([one[1:] for one in continuations]), inside.nonzero()[:, 0]


def _at(states: LastLayerStates, positions: Tensor) -> LastLayerStates:
    return rows_of(states, positions.to(states.residual.device))
