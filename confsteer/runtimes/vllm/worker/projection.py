"""Steering of the last layer of vLLM's model: before an output projection, after experts, before the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from confsteer.errors import ProfileMismatchError
from confsteer.profile.profile import Profile
from confsteer.profile.store import DIRECTION_COLUMN
from confsteer.runtimes.vllm.worker.edits import DirectionEdit, ProjectionEdit, RoutedEdit
from confsteer.runtimes.vllm.worker.experts import (
    MODULE,
    SAME_ANSWERS,
    GatedNeurons,
    Loaded,
    RoutedNeurons,
    answers_error,
    find_experts,
    find_gated,
    find_routed,
)
from confsteer.runtimes.vllm.worker.find import Norms, Projection, check_direction, find_norms, find_projection
from confsteer.runtimes.vllm.worker.table import SteeringTable


class SteeredProjection(NamedTuple):
    """The last layer of this rank, steered."""

    table: SteeringTable
    """Steerings that its tokens follow."""
    neurons: list[int]
    """Columns of `confsteer.runtimes.vllm.edit.edit_of` that this rank holds, in the order of the table's."""
    writes: Tensor
    """Writes of the profile's neurons to the residual, float32 ``[neurons, d_model]``. Those of other ranks are zero."""
    direction: Tensor | None
    """The null direction, float32 ``[d_model]``. None in a profile without one."""
    norms: Norms
    routed: RoutedEdit | None
    """The edit of the neurons of routed experts."""
    known: tuple[Tensor, ...]
    """Tensors that were read from the weights."""
    answers: Tensor | None
    """Outputs of the experts, see `confsteer.runtimes.vllm.worker.experts.Experts.answers`."""


def attach(
    model: nn.Module, profile: Profile, *, max_tokens: int, slots: int, loaded: Sequence[Loaded] = ()
) -> SteeredProjection:
    """Find the last layer in `model`, and steer it from now on. Call it before compilation.

    Args:
        model: the model as vLLM loaded it, LoRA wrappers included.
        profile: of this model.
        max_tokens: most tokens of a step, padding included.
        slots: rows of the table besides the neutral one.
        loaded: weights that `confsteer.runtimes.vllm.worker.experts.keeping_experts` kept while it was loaded.

    Raises:
        UnsupportedModelError: there is no such layer, or no norm after it that is understood.
        ProfileMismatchError: it has other weights.
    """
    found = _find(model, profile, loaded)
    projection, routed, count = found.projection, found.routed, len(profile.steerable)
    before = [] if projection is None else projection.held(profile)
    in_experts = [] if routed is None else routed.positions
    last = [] if profile.null_direction is None else [count]
    device = found.norms.final.gain.device
    neurons = [*before, *in_experts, *last]
    table = SteeringTable(len(neurons), slots=slots, max_tokens=max_tokens, device=device)
    writes = torch.zeros(count, profile.model.d_model, device=device)
    if projection is not None and before:
        writes[before] = projection.writes[projection.units(profile)]
        if found.gated is not None:
            found.gated.steer(table)
        else:
            _steer_projection(model, projection, ProjectionEdit(table, 0, torch.tensor(projection.units(profile), device=device)))
    edit = None
    if routed is not None and in_experts:
        writes[in_experts] = routed.rows.writes[:, : profile.model.d_model].float()
        edit = routed.steer(table, len(before))
    direction = None
    if last:
        direction = profile.columns[DIRECTION_COLUMN].float().to(device)
        _steer_norm(found.norms.module, DirectionEdit(table, len(neurons) - 1, direction))
    return SteeredProjection(table, neurons, writes, direction, found.norms, edit, found.known(profile), found.answers)


def check_unchanged(model: nn.Module, profile: Profile, projection: SteeredProjection) -> None:
    """
    Raises:
        ProfileMismatchError: the weights of the last layer of `model` have changed since `projection` was attached to it.
        UnsupportedModelError: it has none that is understood.
    """
    now = _find(model, profile, None)
    same = all(torch.equal(one, before) for one, before in zip(now.known(profile), projection.known, strict=True))
    if now.answers is not None and projection.answers is not None:
        same &= answers_error(now.answers, projection.answers) <= SAME_ANSWERS[now.answers.dtype]
    if not same:
        raise ProfileMismatchError(
            f"the profile is of {profile.model.id}; the weights that came later are nearly its own, but others"
        )


class _Found(NamedTuple):
    """The parts of a last layer that belong to the profile."""

    projection: Projection | None
    """None in a mixture without a shared expert, or without neurons to steer."""
    gated: GatedNeurons | None
    """The same neurons, if the projection is that of a shared expert with a gate."""
    routed: RoutedNeurons | None
    norms: Norms
    answers: Tensor | None
    """See `confsteer.runtimes.vllm.worker.experts.Experts.answers`."""

    def known(self, profile: Profile) -> tuple[Tensor, ...]:
        """Tensors that show whether weights are still the same."""
        known = [self.norms.final.gain, self.norms.write_gain]
        if self.projection is not None:
            writes = self.projection.writes
            known += [writes[self.projection.units(profile)], writes.norm(dim=1)]
        if self.gated is not None:
            known += [self.gated.rows.gate, self.gated.rows.up]
        return tuple(tensor for tensor in known if tensor is not None)


def _find(model: nn.Module, profile: Profile, loaded: Sequence[Loaded] | None) -> _Found:
    """
    Args:
        model: as vLLM has it.
        profile: of this model.
        loaded: see `attach`; None if the experts were found before, so that their answers are enough.
    """
    experts = profile.model.experts
    if experts is None:
        only = find_projection(model, profile)
        return _Found(only, None, None, only.norms, None)
    if not profile.steerable:
        return _Found(None, None, None, check_direction(model, profile), None)
    projection = find_projection(model, profile) if experts.shared else None
    gated = None if projection is None else find_gated(model, projection, profile)
    if loaded is None:
        mixture = find_experts(model, profile)
        return _Found(projection, gated, None, find_norms(model, mixture.name, profile), mixture.answers())
    routed = find_routed(model, profile, loaded)
    return _Found(projection, gated, routed, find_norms(model, routed.experts.name, profile), routed.answers)


def _steer_projection(model: nn.Module, projection: Projection, edit: ProjectionEdit) -> None:
    """Steer the neurons before an output projection."""
    if hasattr(projection.layer, "requires_unquantized_input"):
        # Set this flag: without it a fused activation may pass inputs that are quantised already.
        projection.layer.requires_unquantized_input = True
    # The model calls the LoRA wrapper, never the layer inside it: hook the wrapper.
    module = model.get_submodule(projection.name.removesuffix(".base_layer"))
    module.add_module(MODULE, edit)
    module.register_forward_pre_hook(_steer)


def _steer_norm(norm: nn.Module, edit: DirectionEdit) -> None:
    """Add a constant to the input of the final norm, with or without a residual that the norm adds."""
    norm.add_module(MODULE, edit)
    norm.register_forward_pre_hook(_steer)


def _steer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Edit the input of a module: ``[tokens, n]``, or ``[1, tokens, n]`` in vLLM's Transformers backend."""
    return (module.get_submodule(MODULE)(args[0]), *args[1:])
