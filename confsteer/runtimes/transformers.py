"""Steering a transformers model: a context manager around ``generate()``, ``forward`` or a pipeline."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from confsteer.errors import SteeringError
from confsteer.last_layer.edit import edited
from confsteer.model.dissect import dissect
from confsteer.model.experts import MixtureAnatomy
from confsteer.model.layers import execution_device
from confsteer.model.locate import unwrap
from confsteer.profile.profile import Profile
from confsteer.profile.store import DIRECTION_COLUMN
from confsteer.runtimes.experts import steer_experts
from confsteer.runtimes.following import Following
from confsteer.runtimes.passes import Asked, Watch, continues, generating, keeps_graphs, recompiled, replaced
from confsteer.runtimes.positions import marker_of
from confsteer.steering import Steering, SteeringFields
from confsteer.text.spelling import Spelling

Request = Steering | dict[str, Any] | str
"""A steering in any of the forms that `Steering.parse` takes."""

_steered: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_entering = threading.Lock()


class Steerer:
    """A model's steering within the context of `steer`. It can be changed while the context is open."""

    def __init__(self, profile: Profile, steerings: Sequence[Steering], tokenizer: Any = None) -> None:
        self.profile = profile
        self.steerings = _resolve(steerings, profile)
        self.positions = self.steerings[0].positions
        self.following: Following | None = None
        """The calls of generate(), for a window of generated tokens. None without such a window."""
        if not isinstance(self.positions, str):
            marker = marker_of(self.positions, lambda: None if tokenizer is None else Spelling(tokenizer))
            self.following = Following(self.positions, marker)
        self.by_row = len(steerings) > 1 or self.positions != "all"
        """Whether edits depend on the row of the batch, or on where in the text a pass is."""
        # Leave inference mode: tensors made in it could not be trained through, or updated outside of it.
        with torch.inference_mode(False):
            # Make them on the default device: they go to the model's device later.
            self._neurons = torch.tensor([neuron.index for neuron in profile.steerable], dtype=torch.long, device="cpu")
            self._table = self._build(self.steerings)  # [4, steerings, neurons]: gain, bias, low, high
            self._constant = self._build_constant(self.steerings)
            """The same for the residual before the final norm, ``[4, steerings, d_model]``. None without a null direction."""
        self._layer = profile.model.layer
        self._rows = 1
        self._marked: Tensor | None = None
        """Positions to steer in this pass, ``[1 or rows, positions]``. None for all."""
        self._watch, self._norm_watch = Watch(asks=self.positions == "generated"), Watch(asks=False)

    def update(self, steering: Request | Sequence[Request] | None = None, /, **request: Unpack[SteeringFields]) -> None:
        """Change the steering from the next forward pass on. Hooks stay in place, so compiled code stays valid.

        Args:
            steering: as many steerings as the context was opened with, or none if keywords of `Steering` are given.
            **request: keywords of `Steering`. Without any: neutral.

        Raises:
            SteeringError: it is malformed or out of reach, or its number or `positions` are not those of the context.
        """
        steerings = _resolve(_as_steerings(steering, request), self.profile)
        if len(steerings) != len(self.steerings) or steerings[0].positions != self.positions:
            raise SteeringError(
                f"update() keeps the number of steerings and their positions: {len(self.steerings)}, '{self.positions}'; "
                f"given {len(steerings)}, '{steerings[0].positions}'. Give as many and the same, or open another context"
            )
        table, constant = self._build(steerings), self._build_constant(steerings)
        self._table.copy_(table)
        if self._constant is not None and constant is not None:
            self._constant.copy_(constant)
        self.steerings = steerings

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled. Every module that holds the hooks then refuses too."""
        raise SteeringError(
            "a model cannot be copied or pickled while it is steered: nothing would end the steering of the copy. Leave the "
            "context first (state_dict() and save_pretrained() may be used in it: they hold the model's own weights)"
        )

    def _build(self, steerings: Sequence[Steering]) -> Tensor:
        edits = [self.profile.edit(steering) for steering in steerings]
        return torch.from_numpy(np.stack([np.stack(columns) for columns in zip(*edits, strict=True)]))

    def _build_constant(self, steerings: Sequence[Steering]) -> Tensor | None:
        if self.profile.null_direction is None:
            return None
        lengths = torch.tensor([self.profile.null_write(steering) for steering in steerings], device="cpu")
        bias = lengths[:, None] * self.profile.columns[DIRECTION_COLUMN].float().cpu()
        gain, low, high = (torch.full_like(bias, value) for value in (1.0, -torch.inf, torch.inf))
        return torch.stack([gain, bias, low, high])

    def _move(self, device: torch.device) -> None:
        """Move the tables to the activations' device."""
        with torch.inference_mode(False):
            self._neurons, self._table = self._neurons.to(device), self._table.to(device)

    def _note_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note, before the last layer, the batch size of this pass and its positions to steer.

        The first argument is ``[rows, positions, d_model]``, because `dissect` ran the model. A cache is among the others,
        because transformers hands it down.
        """
        hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
        self._rows = hidden_states.shape[0]
        if self._rows % len(self.steerings):
            raise SteeringError(
                f"{len(self.steerings)} steerings for a batch of {self._rows}: give one, or one per row (beams and returned "
                "sequences follow their row)"
            )
        if self.following is not None:
            self._marked = self.following.take(hidden_states)
        elif self.positions == "generated":
            asked = self._watch.asked
            if asked is None:
                # Refuse within backward(): it runs checkpointed layers again, and does not say of which pass.
                if torch._C._current_graph_task_id() != -1:
                    raise SteeringError('gradient checkpointing forgets which positions generate: steer with positions="all"')
                asked = Asked(continues=continues((*args, *kwargs.values()), self._layer))
            self._marked = generating(asked, hidden_states.shape[1], hidden_states.device)

    def _edit(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Edit, before the last MLP projection: ``a' = clip(gain · a + bias, low, high)`` on the profile's neurons."""
        self._watch.reach()
        if not len(self._neurons):
            return args
        activations: Tensor = args[0]
        if self._neurons.device != activations.device:
            self._move(activations.device)
        selected = activations.index_select(-1, self._neurons)
        return (activations.index_copy(-1, self._neurons, self._after(selected, self._table)), *args[1:])

    def _add_constant(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add, before the final norm, a constant along the null direction."""
        self._norm_watch.reach()
        residual: Tensor = args[0]
        assert self._constant is not None
        if self._constant.device != residual.device:
            with torch.inference_mode(False):
                self._constant = self._constant.to(residual.device)
        after = self._after(residual, self._constant)
        if self.by_row:
            # Mark the pass here if it leaves out the last layer, as a draft of an early exit does.
            self._marked = None
        return (after, *args[1:])

    def _after(self, before: Tensor, table: Tensor) -> Tensor:
        """Apply the rule to the activations of some neurons, ``[…, n]``, by their part of the table ``[4, steerings, n]``.

        The residual is treated as ``d_model`` neurons, each with a shift.
        """
        gain, bias, low, high = table
        if not self.by_row:
            return edited(before, gain[0], bias[0], low[0], high[0])
        # Take one row per sequence, whether the model keeps [rows, positions, n] or flattens it.
        by_row = before.reshape(self._rows, -1, before.shape[-1])
        per_steering = self._rows // len(self.steerings)
        gain, bias, low, high = (t.repeat_interleave(per_steering, dim=0)[:, None] for t in (gain, bias, low, high))
        after = edited(by_row, gain, bias, low, high)
        if self._marked is not None:
            after = torch.where(self._marked.to(before.device)[..., None], after, by_row)
        return after.reshape(before.shape)

    def _refuse_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Replace a model's continuous batching, and refuse: it packs requests in an order of its own."""
        if self.following is not None:
            raise SteeringError(
                f"positions={self.positions} goes by the tokens of one call of generate(), and continuous batching packs those "
                "of all requests into one row: use generate()"
            )
        raise SteeringError(
            f"{len(self.steerings)} steerings cannot be told apart in continuous batching, which packs all requests into one "
            "row: give one steering for all, or use generate() with a row per request"
        )


@contextlib.contextmanager
def steer(
    model: nn.Module,
    profile: Profile | str | os.PathLike[str],
    steering: Request | Sequence[Request] | None = None,
    /,
    *,
    tokenizer: Any = None,
    **request: Unpack[SteeringFields],
) -> Iterator[Steerer]:
    """Steer `model` within the context.

    **The model is changed in place** when the context is entered: forward hooks, and functions around ``forward``. It is
    restored when the context is left, even by an exception. Without ``with``, nothing happens.

        with confsteer.steer(model, profile, entropy=+0.3):
            model.generate(**inputs)

    The hooks change activations, not weights: ``state_dict()`` and ``save_pretrained()`` within the context give the model's
    own. ``copy.deepcopy``, ``pickle`` and ``torch.save`` of the whole model are refused there. Every thread that runs the model
    is steered while the context is open. With a steering per row, or other ``positions`` than all, only one thread at a time may
    run it. A forked process has a steered model of its own.

    Windows of generated tokens, ``positions={"first": N}`` and ``{"after": MARKER}``, work in ``generate()``. They work with
    greedy search, sampling, beams, assistants and continued caches: any method that prepares its passes as transformers does.
    Tokens count from the call of ``generate()``. Other passes are refused.

    Args:
        model: a transformers causal language model, which may be PEFT-wrapped or compiled. Code that was compiled before is
            compiled again in the context. `Steerer.update` changes the steering of compiled code without that.
        profile: the model's profile, or a source that `Profile.load` takes.
        steering: a `Steering`, a request that `Steering.parse` takes, or a list of these with one per row of the batch.
        tokenizer: the model's tokenizer. Only ``positions={"after": TEXT}`` needs it.
        **request: keywords of a `Steering`, in place of `steering`: ``entropy``, ``unigram``, ``scale``, ``shift``, ``clamp``,
            ``positions``, ``preset``. Without any: neutral.

    Raises:
        SteeringError: the request is malformed or out of reach, or the model is being steered already.
        NoNeuronsError: the profile has no neurons to turn.
        ProfileMismatchError: the profile is of another model.
        UnsupportedModelError: see `confsteer.model.dissect`.
    """
    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    steerer = Steerer(profile, _as_steerings(steering, request), tokenizer)
    anatomy, base = dissect(model), unwrap(model)
    profile.check_model(anatomy)
    steerer._move(execution_device(anatomy.down_proj))
    if keeps_graphs(base):
        raise SteeringError(
            "this model keeps CUDA graphs that were captured without steering, for continuous batching: call its "
            "destroy_cached_continuous_batching_manager() first"
        )
    with contextlib.ExitStack() as stack:
        with _entering:
            if anatomy.down_proj in _steered:
                raise SteeringError("this model is being steered already: leave that context first, or use its update()")
            _steered.add(anatomy.down_proj)
        stack.callback(_steered.discard, anatomy.down_proj)
        stack.callback(_drop_graphs, base)
        stack.enter_context(recompiled(anatomy.down_proj))
        if steerer.by_row:
            stack.enter_context(recompiled(anatomy.last_layer))
            stack.callback(anatomy.last_layer.register_forward_pre_hook(steerer._note_pass, with_kwargs=True).remove)
        if steerer.following is not None:
            stack.enter_context(steerer.following.over(base))
        if len(steerer.steerings) > 1 or steerer.following is not None:
            stack.enter_context(replaced(base, "init_continuous_batching", steerer._refuse_batching))
        if isinstance(anatomy, MixtureAnatomy):
            steer_experts(anatomy, steerer, stack)
        else:
            stack.callback(anatomy.down_proj.register_forward_pre_hook(steerer._edit).remove)
        if profile.null_direction is not None:
            stack.enter_context(recompiled(anatomy.final_norm))
            stack.callback(anatomy.final_norm.register_forward_pre_hook(steerer._add_constant).remove)
            stack.enter_context(steerer._norm_watch.over(base))
        # Start the watch last, and stop it first: threads may run the model before and after.
        stack.enter_context(steerer._watch.over(base))
        yield steerer


def _drop_graphs(base: PreTrainedModel) -> None:
    """Drop CUDA graphs that were captured with the steering in them."""
    model: Any = base
    if keeps_graphs(base):
        model.destroy_cached_continuous_batching_manager()


def _as_steerings(steering: Request | Sequence[Request] | None, request: SteeringFields) -> Sequence[Steering]:
    if steering is not None and request:
        raise SteeringError("give a Steering or its keywords, not both")
    if steering is None:
        return [Steering.parse({**request})]
    several = steering if isinstance(steering, Sequence) and not isinstance(steering, str) else [steering]
    steerings = [Steering.parse(one) for one in several]
    if not steerings:
        raise SteeringError("an empty list of steerings: give one, or one per row of the batch")
    return steerings


def _resolve(steerings: Sequence[Steering], profile: Profile) -> tuple[Steering, ...]:
    resolved = tuple(profile.resolve(steering) for steering in steerings)
    if len({steering.positions for steering in resolved}) > 1:
        given = ", ".join(dict.fromkeys(f"'{steering.positions}'" for steering in resolved))
        raise SteeringError(f"all rows of a batch must have the same positions; given {given}")
    return resolved
