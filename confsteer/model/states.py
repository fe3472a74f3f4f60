"""Forward passes over texts, one batch at a time: the states of the last layer at the positions that count.

All that is measured follows from these states in closed form, so the closed form must be the model's own. `dissect` checks
that on random ids, once per model. Here it is checked again on the text itself, for the model may have changed since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from confsteer.distributed import SINGLE_PROCESS, Process
from confsteer.errors import ConfsteerError, SteeringError, UnsupportedModelError
from confsteer.last_layer.experts import of_neurons
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.states import TokenStates, join_rows, rows_of
from confsteer.model.anatomy import Anatomy, LastLayerStates
from confsteer.model.experts import MixtureAnatomy, writes_error
from confsteer.model.layers import (
    dtype_name,
    is_plain,
    on_device,
    output_weights,
    relative_error,
    sizes,
    without_adapter,
    without_compiler,
)
from confsteer.model.locate import eagerly, input_device, unwrap
from confsteer.text.windows import FIRST_POSITIONS, WindowBatch, Windows, check_ids

BATCH_SIZE = 4
"""Windows per forward pass: about a thousand tokens, enough to keep matrix products busy."""
KEPT_BYTES = 2**30
"""States up to this size are kept for the next pass over the text unless told otherwise; the model runs again for the rest."""
CHECKED_TOKENS = 8
"""Tokens of a text on which the closed form is compared with the model: too few to take time."""
TOLERANCE, HALF_TOLERANCE = 5e-3, 0.1
"""Relative errors of logits that are rounding, in float32 and in half precision."""


class Recording:
    """The states of a text, to be read more than once.

    The caller must have put the model in evaluation mode. Logits are not computed, but for a few tokens of the first batch that
    the model runs: see `check_closed_form`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        windows: Windows,
        device: torch.device,
        process: Process = SINGLE_PROCESS,
        room: int = KEPT_BYTES,
        readout: Readout | None = None,
        sample_tokens: int | None = None,
    ) -> None:
        """
        Args:
            model: the model.
            anatomy: where to look.
            windows: the text.
            device: where the states go.
            process: this one, which reads every ``world_size``-th batch.
            room: bytes of states to keep.
            readout: the closed form that the states are for, to be checked; folded for the time of the check if None.
            sample_tokens: about how many tokens of each text the sample has, which is always kept; all of them if None.
        """
        self.model, self.anatomy, self.windows, self.device, self.process = model, anatomy, windows, device, process
        self._readout = readout
        self._checked: set[bool] = set()
        self._kept: dict[int, TokenStates] = {}
        self._room = room
        self._strides = [1 if sample_tokens is None else max(1, tokens // sample_tokens) for tokens in windows.text_tokens]
        self._sampled: dict[int, TokenStates] = {}

    @property
    def sample_tokens(self) -> int:
        """Count the tokens of the sample, about: a window may have one more or less."""
        return sum(tokens // stride for tokens, stride in zip(self.windows.text_tokens, self._strides, strict=True))

    def read(
        self,
        on_read: Callable[[int], object] = lambda tokens: None,
        *,
        start: int = 0,
        sample: bool = False,
        text: int | None = None,
    ) -> Iterator[TokenStates]:
        """Pass over the text once, a batch at a time.

        Args:
            on_read: called with the number of tokens of each batch when its turn comes, and of each that is passed over.
            start: how many batches to pass over, without running the model.
            sample: whether to read every so-many-th token of each window only.
            text: number of the only text to read, of which `start` is counted; all if None.

        Raises:
            SteeringError, UnsupportedModelError: see `check_closed_form`.
        """
        mine = islice(self.windows.batches(BATCH_SIZE), self.process.rank, None, self.process.world_size)
        of_text = ((position, batch) for position, batch in enumerate(mine) if text in (None, batch.text))
        for number, (position, batch) in enumerate(of_text):
            on_read(int(batch.attention_mask.sum()))
            if number >= start:
                yield self._states(position, batch, sample=sample)

    def _states(self, position: int, batch: WindowBatch, *, sample: bool) -> TokenStates:
        """Look up the states of a batch or of its sample; run the model if they were not kept."""
        stride = self._strides[batch.text]
        sample = sample and stride > 1
        states = (self._sampled if sample else self._kept).get(position)
        if states is not None:
            return states
        states = self._run(batch)
        if (size := _size(states)) <= self._room:
            self._kept[position] = states
            self._room -= size
        if stride > 1:
            self._sampled[position] = states.at(_every(stride, states))
        return self._sampled[position] if sample else states

    def _run(self, batch: WindowBatch) -> TokenStates:
        with _given(batch.inputs, self.model):
            # With images the model goes another way: of each kind the first is looked at.
            if (kind := bool(batch.inputs)) not in self._checked:
                ids = batch.input_ids[0, : int(batch.attention_mask[0].sum())]
                check_closed_form(self.model, self.anatomy, ids, self._readout, batch.inputs)
                self._checked.add(kind)
            further = {**batch.inputs, "use_cache": False}
            states, _ = _forward(self.model, self.anatomy, batch.input_ids, batch.attention_mask, **further)
        kept = batch.kept.flatten().to(states.residual.device)
        of_kept = rows_of(states, kept)._asdict()
        return TokenStates(**of_kept, targets=batch.targets, window=batch.window).to(self.device)


@contextlib.contextmanager
def _given(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> Iterator[None]:
    """
    Raises:
        UnsupportedModelError: the model does not take `inputs`, if there are any.
    """
    try:
        yield
    except ConfsteerError:
        raise
    except (TypeError, ValueError) as error:
        if not inputs:
            raise
        names = ", ".join(inputs)
        raise UnsupportedModelError(
            f"{unwrap(model).config.model_type} does not take what the processor gives it with an image ({names}): {error}"
        ) from error


def _forward(
    model: PreTrainedModel, anatomy: Anatomy, input_ids: Tensor, attention_mask: Tensor, **further: Any
) -> tuple[LastLayerStates, Any]:
    """Run the body once; the states it leaves in the last layer, and its output.

    Raises:
        SteeringError: see `check_closed_form`.
    """
    check_ids(input_ids, anatomy.vocab_size)
    with _unsteered(anatomy):
        return _pass(_body(model, anatomy), model, anatomy, input_ids, attention_mask, **further)


def _body(model: PreTrainedModel, anatomy: Anatomy) -> nn.Module:
    """Find the least of a model that runs its final norm: without the unembedding, which not every position needs."""
    body: nn.Module = model.base_model
    return body if anatomy.final_norm in set(body.modules()) else without_compiler(model)


def _pass(
    run: Callable[..., Any], model: PreTrainedModel, anatomy: Anatomy, input_ids: Tensor, attention_mask: Tensor, **further: Any
) -> tuple[LastLayerStates, Any]:
    """Run a model or its body."""
    received: list[LastLayerStates] = []
    with anatomy.recording(received.append):
        output = _run(run, model, input_ids, attention_mask, **further)
    (states,) = received
    return states, output


@torch.no_grad()
def _run(run: Callable[..., Any], model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **further: Any) -> Any:
    device = input_device(model)
    for name, value in further.items():
        if isinstance(value, Tensor):
            # Pixels come in float32, whatever the weights are.
            further[name] = value.to(device, unwrap(model).dtype if value.is_floating_point() else value.dtype)
    return run(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **further)


@contextlib.contextmanager
def _unsteered(anatomy: Anatomy) -> Iterator[None]:
    """Within the context no hook may change the activations that the last projection is given.

    Raises:
        SteeringError: from within the forward pass.
    """
    kept: dict[nn.Module, tuple[Tensor, int]] = {}

    def keep(module: nn.Module, tensor: Tensor) -> None:
        # In inference mode PyTorch does not count how often a tensor is written into.
        inference = tensor.is_inference()
        kept[module] = (tensor.clone(), 0) if inference else (tensor, tensor._version)

    def compare(module: nn.Module, tensor: Tensor) -> None:
        before, version = kept.pop(module)
        # Without other hooks it is the same tensor, and there is nothing to compare.
        written = not before.is_inference() and before._version != version
        if written or not (tensor is before or torch.equal(tensor, before)):
            raise SteeringError(
                "the model is being steered: something changes the activations of its last MLP, such as an open steer() context. "
                "Leave the context first (or remove the hook): measuring compares steerings with the unsteered model by itself"
            )

    with contextlib.ExitStack() as stack:
        # A context that was opened before an adapter was put around the layer has its hook inside.
        for module in {one for layer in anatomy.linear_projections for one in (layer, without_adapter(layer))}:
            stack.callback(module.register_forward_pre_hook(lambda m, args: keep(m, args[0]), prepend=True).remove)
            stack.callback(module.register_forward_pre_hook(lambda m, args: compare(m, args[0])).remove)
        if isinstance(anatomy, MixtureAnatomy):
            # Neurons of routed experts are steered behind them.
            module = anatomy.down_proj
            stack.callback(module.register_forward_hook(lambda m, args, output: keep(m, output), prepend=True).remove)
            stack.callback(module.register_forward_hook(lambda m, args, output: compare(m, output)).remove)
        yield


@torch.no_grad()
def check_closed_form(
    model: PreTrainedModel,
    anatomy: Anatomy,
    ids: Tensor,
    readout: Readout | None = None,
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Compare the closed form with the model itself on the first `CHECKED_TOKENS` of a text; with images, on the last.

    Three passes over these tokens: of the body, as it is measured; of the whole model, as it is used; and with a few activations
    changed.

    Args:
        model: the model, as the caller has it: adapters and all.
        anatomy: its last layer.
        ids: of the text, ``[tokens]``.
        readout: the closed form to be checked; folded anew if None.
        inputs: what the model is given beside all of `ids`, see `confsteer.text.windows.WindowBatch`.

    Raises:
        SteeringError: the model is being steered.
        UnsupportedModelError: its weights have changed since they were read; adapters on its last projection or unembedding
            take part; or its logits on this text, or what its neurons write, are not the closed form's.
    """
    name = unwrap(model).config.model_type
    if anatomy.changed_since_readout:
        raise UnsupportedModelError(
            f"{name}: the weights of the last layer have changed since they were read: measure again, and let nothing write "
            "into the model meanwhile"
        )
    readout = anatomy.readout() if readout is None else readout
    ids = ids[None] if inputs else ids[None, :CHECKED_TOKENS]
    mask, device, further = torch.ones_like(ids), readout.unembedding.device, {**inputs, "use_cache": False}
    check_ids(ids, anatomy.vocab_size)
    with eagerly(), _unsteered(anatomy):
        states, _ = _pass(_body(model, anatomy), model, anatomy, ids, mask, **further)
        # Of a long window with images all logits would be gigabytes.
        few = inputs and "logits_to_keep" in signature(unwrap(model).forward).parameters
        last = {"logits_to_keep": CHECKED_TOKENS} if few else {}
        own, output = _pass(without_compiler(model), model, anatomy, ids, mask, **further, **last)
    residual, theirs = own.residual, output.logits.flatten(0, -2)
    exact = all(t.dtype == torch.float32 for t in (states.activations, residual, theirs))
    tolerance = TOLERANCE if exact else HALF_TOLERANCE
    if not (residual.isfinite().all() and theirs.isfinite().all()):
        raise UnsupportedModelError(
            f"{name}: its outputs are not finite on this text: its weights are damaged, or too large for "
            f"{dtype_name(theirs.dtype)} (--dtype float32)"
        )
    if residual.shape != states.residual.shape or _worst_error(states.residual, residual) > tolerance:
        raise UnsupportedModelError(
            f"{name}: the whole model reads this text in another way than its body does: {type(model).__name__} adds to it, as "
            "prompt and prefix tuning do. Those cannot be measured; give the model without them"
        )
    _refuse_adapters(anatomy, states, name)
    if inputs:
        _check_seen(model, anatomy, states, ids, mask, inputs)
    # The first tokens of a text may be unlike all others.
    counted = slice(max(ids.shape[1] - CHECKED_TOKENS, FIRST_POSITIONS if ids.shape[1] > FIRST_POSITIONS else 0), None)
    ours = readout.logits(residual[counted].to(device))
    expected = theirs[counted.start - ids.shape[1] :, : readout.vocab_size].float().to(device)
    error = relative_error(ours - ours.mean(dim=-1, keepdim=True), expected - expected.mean(dim=-1, keepdim=True))
    if not error < tolerance:
        raise UnsupportedModelError(
            f"{name}: on this text the model's logits are not its unembedding applied to its final norm (relative error "
            f"{error:.1e}, at most {tolerance:.0e}): a hook, an adapter or a patch changes them. Remove it, or merge it into the "
            "weights and calibrate those"
        )
    if isinstance(anatomy, MixtureAnatomy):
        error = writes_error(anatomy, lambda: _run(_body(model, anatomy), model, ids, mask, **further), counted)
    else:
        error = relative_error(*_push(model, anatomy, states, counted, ids, mask, **further))
    if not error < tolerance:
        raise UnsupportedModelError(
            f"{name}: on this text a neuron of the last MLP does not move the residual by its output weights (relative error "
            f"{error:.1e}, at most {tolerance:.0e}): a hook or a patch changes the MLP's output. Remove it, or merge it into the "
            "weights and calibrate those"
        )


def _worst_error(ours: Tensor, theirs: Tensor) -> float:
    """Compare the vectors of each position: the largest of their relative errors."""
    ours, theirs = ours.float(), theirs.float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)).max())


def _check_seen(
    model: PreTrainedModel, anatomy: Anatomy, states: LastLayerStates, ids: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]
) -> None:
    """
    Raises:
        UnsupportedModelError: other pixels leave the same states, as in a model that lets arguments pass which it does not know.
    """
    # Neither black nor white: padding may be known by that.
    other = {name: 0.5 * value + 0.3 if value.is_floating_point() else value for name, value in inputs.items()}
    changed, _ = _pass(_body(model, anatomy), model, anatomy, ids, mask, **other, use_cache=False)
    if torch.equal(changed.residual, states.residual):
        raise UnsupportedModelError(
            f"{unwrap(model).config.model_type} does not take what the processor gives it with an image ({', '.join(inputs)}): "
            "other pixels change nothing"
        )


def _push(
    model: PreTrainedModel, anatomy: Anatomy, states: LastLayerStates, counted: slice, ids: Tensor, mask: Tensor, **further: Any
) -> tuple[Tensor, Tensor]:
    """Add as much to every activation; how the residual moves, and how it should, ``[counted tokens, d_model]`` each."""
    projection, norm = anatomy.down_proj, anatomy.write_norm
    ones = torch.ones_like(states.activations[:1])
    with on_device(without_adapter(projection)):
        if is_plain(projection):
            write = output_weights(projection).sum(dim=0, dtype=torch.float32).to(ones.device)
        else:
            write = (projection(ones) - projection(torch.zeros_like(ones)))[0].float()
    onto = (states.residual if norm is None or states.mlp_output is None else states.mlp_output)[counted]
    # As large as what it is added to, so that rounding in half precision stays small beside it.
    size = float((onto.float().norm(dim=-1).mean() / write.norm().clamp_min(1e-12)).to(ones.dtype))

    def push(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + size, *args[1:])

    handle = projection.register_forward_pre_hook(push, prepend=True)
    try:
        after, _ = _pass(_body(model, anatomy), model, anatomy, ids, mask, **further)
    finally:
        handle.remove()
    moved = (after.residual.float() - states.residual.float())[counted]
    if norm is None or states.mlp_output is None:
        return moved, (anatomy.residual_multiplier * size * write).expand_as(moved)
    pushed = (onto.float() + size * write).to(onto.dtype)
    return moved, anatomy.residual_multiplier * (norm(pushed).float() - norm(onto).float())


def _refuse_adapters(anatomy: Anatomy, states: LastLayerStates, name: str) -> None:
    """
    Raises:
        UnsupportedModelError: adapters on the last projection or the unembedding take part; the closed form has neither.
    """
    layers: list[tuple[str, nn.Module, Tensor | None]] = [("unembedding", anatomy.unembedding, None)]
    for layer in anatomy.linear_projections:
        # Any input tells whether an adapter adds something.
        layers.append(("last MLP projection", layer, states.activations[:, -sizes(layer)[0] :]))
    for place, module, x in layers:
        inner = without_adapter(module)
        if inner is module:
            continue
        x = anatomy.final_norm(states.residual) if x is None else x
        # To the bit: where an adapter adds nothing, or is switched off, the layer inside answers by itself.
        if not torch.equal(module(x), inner(x)):
            raise UnsupportedModelError(
                f"{name}: the model has adapters (PEFT) on its {place}, which are not part of its weights: merge them first, "
                "model = model.merge_and_unload(), and calibrate the merged model"
            )


def _every(stride: int, states: TokenStates) -> Tensor:
    """Mark every stride-th token of each window, in however many batches the windows come, ``[tokens]`` bool."""
    in_window = torch.arange(len(states.window), device=states.window.device) - torch.searchsorted(states.window, states.window)
    return in_window % stride == 0


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
    return join_rows([b._replace(window=b.window + start) for b, start in zip(batches, first, strict=True)])


def record(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Windows,
    neurons: Tensor,
    device: torch.device,
    on_read: Callable[[int], object] = lambda tokens: None,
    readout: Readout | None = None,
) -> TokenStates:
    """Keep the states of a whole text in memory: of the activations those of some neurons, ``d_model`` numbers a token besides.

    The caller must have put the model in evaluation mode.

    Args:
        model: the model.
        anatomy: where to look.
        windows: the text; ``window`` of the states counts through it.
        neurons: indices ``[n]`` of the neurons whose activations to keep.
        device: where the states go.
        on_read: see `Recording.read`.
        readout: see `Recording`.

    Raises:
        SteeringError, UnsupportedModelError: see `check_closed_form`.
    """
    kept = []
    read = Recording(model, anatomy, windows, device, room=0, readout=readout).read(on_read)
    for (_, numbers), batch in zip(windows.batch_ranges(BATCH_SIZE), read, strict=True):
        batch = of_neurons(anatomy.experts, batch, neurons.to(device))
        kept.append(batch._replace(window=batch.window + numbers.start))
    return join_rows(kept)


def record_continuations(
    model: PreTrainedModel,
    anatomy: Anatomy,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    neurons: Tensor,
    device: torch.device,
    on_read: Callable[[int], object] = lambda sequences: None,
    readout: Readout | None = None,
) -> TokenStates:
    """Record the states at the positions that predict the tokens of continuations.

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
        readout: see `Recording`.

    Raises:
        SteeringError, UnsupportedModelError: see `check_closed_form`.
    """
    if sequences:
        check_closed_form(model, anatomy, torch.tensor(sequences[0][0]), readout)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(sequences):
        by_context.setdefault(tuple(context), []).append(i)
    kept: list[TokenStates] = []
    for context, members in by_context.items():
        continuations = [torch.tensor(sequences[i][1]) for i in members]
        for states, targets, window in _continue(model, anatomy, torch.tensor([context]), continuations):
            of_all = TokenStates(**states._asdict(), targets=targets, window=torch.tensor(members)[window])
            few = of_neurons(anatomy.experts, of_all, neurons.to(states.activations.device))
            kept.append(few.to(device))
        on_read(len(members))
    return join_rows(kept)


def _continue(
    model: PreTrainedModel, anatomy: Anatomy, context: Tensor, continuations: list[Tensor]
) -> Iterator[tuple[LastLayerStates, Tensor, Tensor]]:
    """Yield states, the token that each predicts, and the continuation it is of.

    First tokens come first, then the rest, padded on the right.
    """
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
