"""Where the last MLP's output projection is in vLLM's model, and the edit on its input.

vLLM's models are not transformers'. They are found by sizes and confirmed by weights: the projection is the linear layer of
the profile's layer whose neurons' writes have the norms that calibration found, each of thousands of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from confsteer.errors import ProfileMismatchError, UnsupportedModelError
from confsteer.last_layer.readout import NormParameters
from confsteer.model.factors import residual_multiplier
from confsteer.model.layers import UNITS_AT_ONCE, read_norm
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.worker.table import SteeringTable

WRITE_NORM = re.compile(r"post_(feedforward|mlp)_layernorm")
"""A norm on the MLP's output, by the names that it has in vLLM's models."""
TABLE = "confsteer"
"""Name of the table among the modules of the projection."""
NORM_TOLERANCE, QUANTISED_TOLERANCE = 2e-3, 5e-2
"""Relative error of the norms: of every neuron, and, where weights are quantised, of the median neuron."""


class SteeredProjection(NamedTuple):
    """The projection of this rank, steered."""

    table: SteeringTable
    """Steerings that its tokens follow."""
    neurons: list[int]
    """Positions in `Profile.steerable` of the neurons that this rank holds, in the order of the table's."""
    writes: Tensor
    """Writes of the profile's neurons to the residual, zero for those of other ranks; float32 ``[neurons, d_model]``."""
    norms: Tensor
    """Norms of the writes of all of this rank's neurons, ``[local neurons]``."""
    final_norm: NormParameters
    write_gain: Tensor | None
    """Gain of a norm on the MLP's output, ``[d_model]``."""


def _steer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the projection. Activations are ``[tokens, n]``, or ``[1, tokens, n]`` in vLLM's Transformers backend."""
    table = module.get_submodule(TABLE)
    return (table(args[0]), *args[1:])


def attach(model: nn.Module, profile: Profile, *, max_tokens: int, slots: int) -> SteeredProjection:
    """Find the projection in `model` and have it steered from now on; before compilation.

    Args:
        model: as vLLM loaded it, LoRA wrappers included.
        profile: of this model.
        max_tokens: of a step, padding included.
        slots: rows of the table besides the neutral one.

    Raises:
        UnsupportedModelError: there is no such layer, or no norm after it that is understood.
        ProfileMismatchError: it has other weights.
    """
    name, layer, writes, first, final_norm, write_gain = _find(model, profile)
    if hasattr(layer, "requires_unquantized_input"):
        # Without this flag a fused activation may pass already-quantised inputs.
        layer.requires_unquantized_input = True
    columns = [neuron.index - first for neuron in profile.steerable]
    local = [i for i, column in enumerate(columns) if 0 <= column < len(writes)]
    own = torch.tensor([columns[i] for i in local], dtype=torch.int64, device=writes.device)
    profile_writes = torch.zeros(len(columns), writes.shape[1], device=writes.device)
    profile_writes[local] = writes[own]
    table = SteeringTable(own, slots=slots, max_tokens=max_tokens)
    if local:
        # The model calls the LoRA wrapper, never the layer inside it: hook the wrapper.
        module = model.get_submodule(name.removesuffix(".base_layer"))
        module.add_module(TABLE, table)
        module.register_forward_pre_hook(_steer)
    return SteeredProjection(table, local, profile_writes, writes.norm(dim=1), final_norm, write_gain)


def check_unchanged(model: nn.Module, profile: Profile, projection: SteeredProjection) -> None:
    """
    Raises:
        ProfileMismatchError: the last layer of `model` has other weights than when `projection` was attached to it.
        UnsupportedModelError: it has none that is understood.
    """
    _, _, writes, _, final_norm, write_gain = _find(model, profile)
    pairs = [
        (writes[projection.table.neurons], projection.writes[projection.neurons]),
        (writes.norm(dim=1), projection.norms),
        (final_norm.gain, projection.final_norm.gain),
    ]
    if write_gain is not None and projection.write_gain is not None:
        pairs.append((write_gain, projection.write_gain))
    if not all(torch.equal(now, before) for now, before in pairs):
        raise ProfileMismatchError(
            f"the profile is of {profile.model.id}; the weights that came later are nearly its own, but others"
        )


class _Found(NamedTuple):
    """A projection whose neurons write what those of the profile do."""

    name: str
    layer: LinearBase
    writes: Tensor
    """``[local neurons, d_model]``."""
    first: int
    """Index of the first of its neurons."""
    final_norm: NormParameters
    write_gain: Tensor | None


def _find(model: nn.Module, profile: Profile) -> _Found:
    identity = profile.model
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
        and (module.input_size, module.output_size) == (identity.n_neurons, identity.d_model)
        and str(identity.layer) in name.split(".")
    ]
    if not candidates:
        raise UnsupportedModelError(
            f"vLLM's {type(model).__name__} has no linear layer from {identity.n_neurons:,} to {identity.d_model:,} in layer "
            f"{identity.layer}: its last MLP may be a mixture of experts, or the profile is of another model"
        )
    config: Any = getattr(model, "config", PretrainedConfig())
    text_config, errors = config.get_text_config(decoder=True), []
    for name, layer in candidates:
        final_norm, write_gain = _norms(model, name, profile)
        writes = writes_of(layer)
        first = layer.tp_rank * len(writes) if len(writes) < identity.n_neurons else 0
        expected = profile.columns["norm"][first : first + len(writes)].to(writes.device)
        seen = writes if write_gain is None else writes * write_gain
        seen = seen * residual_multiplier(text_config, model.get_submodule(_layer(name, identity.layer)))
        seen = seen - seen.mean(dim=1, keepdim=True) if final_norm.centred else seen
        error = (seen.norm(dim=1) - expected).abs() / expected.clamp_min(1e-12)
        plain = isinstance(layer.quant_method, UnquantizedLinearMethod)
        if float(error.max()) <= NORM_TOLERANCE if plain else float(error.median()) <= QUANTISED_TOLERANCE:
            return _Found(name, layer, writes, first, final_norm, write_gain)
        errors.append(f"{name}: {float(error.median()):.1e}")
    raise ProfileMismatchError(
        f"the profile is of {identity.id}; the model that vLLM loaded has other weights (relative error of the norms of the "
        f"median neuron's write in {', '.join(errors)}). Calibrate it: confsteer calibrate MODEL"
    )


def writes_of(layer: LinearBase) -> Tensor:
    """Ask the layer what a unit of each of this rank's inputs adds to the output, float32 ``[inputs, outputs]``.

    However the weights are quantised or packed, the layer can be asked.
    """
    device, inputs = next(layer.parameters()).device, getattr(layer, "input_size_per_partition", layer.input_size)
    answers = []
    with torch.no_grad():
        for first in range(0, inputs, UNITS_AT_ONCE):
            count = min(UNITS_AT_ONCE, inputs - first)
            units = torch.zeros(count, inputs, device=device, dtype=layer.params_dtype)
            units[torch.arange(count), torch.arange(first, first + count)] = 1
            answers.append(layer.quant_method.apply(layer, units, None).float())
    return torch.cat(answers)


def _norms(model: nn.Module, projection: str, profile: Profile) -> tuple[NormParameters, Tensor | None]:
    """The final norm of the language model that a projection is in, and the gain of a norm on the projection's output."""
    layer = _layer(projection, profile.model.layer)
    norms = dict(_norm_modules(model, profile.model.d_model))
    final, parent = None, layer.rpartition(".")[0]
    # The nearest above the layers: what sees or hears has norms of its own.
    while final is None and parent:
        parent = parent.rpartition(".")[0]
        inside = (
            norm for name, norm in norms.items() if name.startswith(parent and f"{parent}.") and not re.search(r"\.\d+\.", name)
        )
        final = next(reversed([*inside]), None)
    if final is None:
        raise UnsupportedModelError(f"vLLM's {type(model).__name__} has no final norm that confsteer finds")
    write = next((norm for name, norm in norms.items() if name.startswith(f"{layer}.") and WRITE_NORM.search(name)), None)
    gain = None if write is None else read_norm(write, profile.model.d_model).gain
    return read_norm(final, profile.model.d_model), gain


def _layer(projection: str, layer: int) -> str:
    """Name the layer that a projection is in."""
    return f"{projection.partition(f'.{layer}.')[0]}.{layer}"


def _norm_modules(model: nn.Module, d_model: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # OLMo's norms have none
        if "norm" in type(module).__name__.lower() and (weight is None or weight.shape == (d_model,)):
            yield name, module
