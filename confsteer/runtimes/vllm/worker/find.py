"""Search for the modules at the end of vLLM's model.

vLLM's models are not transformers'. Modules are found by their sizes and confirmed by their weights. The right layer is the one
whose neurons' writes have the norms that calibration found. There are thousands of neurons, and each must fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from confsteer.errors import ProfileMismatchError, UnsupportedModelError
from confsteer.last_layer.readout import NormParameters
from confsteer.model.factors import residual_multiplier
from confsteer.model.layers import UNITS_AT_ONCE, read_norm
from confsteer.profile.profile import Profile
from confsteer.profile.store import DIRECTION_COLUMN

WRITE_NORM = re.compile(r"post_(feedforward|mlp)_layernorm")
"""Names of a norm on the MLP's output in vLLM's models."""
NORM_TOLERANCE, QUANTISED_TOLERANCE = 2e-3, 5e-2
"""Largest relative error of the norms: for every neuron, and, if weights are quantised, for the median neuron."""


class Norms(NamedTuple):
    """Norms and factors between the writes of a layer's neurons and the unembedding."""

    module: nn.Module
    """The final norm."""
    final: NormParameters
    write_gain: Tensor | None
    """Gain of a norm on the MLP's output, ``[d_model]``."""
    multiplier: float
    """Factor of the MLP's output as it is added to the residual."""

    def seen(self, writes: Tensor) -> Tensor:
        """Compute the norms ``[n]`` that a profile would have for neurons with these writes ``[n, d_model]``."""
        seen = writes if self.write_gain is None else writes * self.write_gain.to(writes)
        seen = seen - seen.mean(dim=1, keepdim=True) if self.final.centred else seen
        return (seen * self.multiplier).square().sum(dim=1).sqrt()


class Projection(NamedTuple):
    """An output projection whose neurons have the profile's writes."""

    name: str
    layer: LinearBase
    writes: Tensor
    """Writes of the neurons that this rank holds, float32 ``[local neurons, d_model]``."""
    first: int
    """Index of the first of them in the profile."""
    norms: Norms

    def held(self, profile: Profile) -> list[int]:
        """Positions in `Profile.steerable` of the neurons that this rank holds."""
        return [i for i, neuron in enumerate(profile.steerable) if 0 <= neuron.index - self.first < len(self.writes)]

    def units(self, profile: Profile) -> list[int]:
        """Rows of `writes` of the same neurons."""
        return [profile.steerable[position].index - self.first for position in self.held(profile)]


def find_projection(model: nn.Module, profile: Profile) -> Projection:
    """Find the output projection of the last MLP, or of the shared expert of a mixture.

    Raises:
        UnsupportedModelError: there is no such layer, or no known norm after it.
        ProfileMismatchError: it has other weights.
    """
    identity = profile.model
    n_routed = 0 if identity.experts is None else identity.experts.n_routed
    n_inputs = identity.n_neurons - n_routed
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
        and (module.input_size, module.output_size) == (n_inputs, identity.d_model)
        and str(identity.layer) in name.split(".")
    ]
    if not candidates:
        what = "its last MLP may be a mixture of experts, or " if identity.experts is None else ""
        raise UnsupportedModelError(
            f"vLLM's {type(model).__name__} has no linear layer from {n_inputs:,} to {identity.d_model:,} in layer "
            f"{identity.layer}: {what}the profile is of another model"
        )
    errors = []
    for name, layer in candidates:
        norms = find_norms(model, name, profile)
        writes = writes_of(layer)
        first = n_routed + (layer.tp_rank * len(writes) if len(writes) < n_inputs else 0)
        plain = isinstance(layer.quant_method, UnquantizedLinearMethod)
        error = norm_errors(profile, norms.seen(writes), first)
        if float(error.max()) <= NORM_TOLERANCE if plain else float(error.median()) <= QUANTISED_TOLERANCE:
            return Projection(name, layer, writes, first, norms)
        errors.append(f"{name}: {float(error.median()):.1e}")
    raise other_weights(profile, ", ".join(errors))


def norm_errors(profile: Profile, norms: Tensor, first: int) -> Tensor:
    """Compute relative errors ``[n]`` of the norms of neurons' writes, from the profile's neuron `first` on."""
    expected = profile.columns["norm"][first : first + len(norms)].to(norms.device)
    return (norms - expected).abs() / expected.clamp_min(1e-12)


def other_weights(profile: Profile, errors: str) -> ProfileMismatchError:
    """Make the error for a model whose neurons do not have the profile's writes."""
    return ProfileMismatchError(
        f"the profile is of {profile.model.id}; the model that vLLM loaded has other weights (relative error of the norms of the "
        f"median neuron's write in {errors}). Calibrate it: confsteer calibrate MODEL"
    )


def writes_of(layer: LinearBase) -> Tensor:
    """Ask the layer how much a unit of each of this rank's inputs adds to the output, float32 ``[inputs, outputs]``.

    This works however the weights are quantised or packed.
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


def find_norms(model: nn.Module, within: str, profile: Profile) -> Norms:
    """Find the final norm of the language model around a module of the last layer, and a norm on the MLP's output.

    Raises:
        UnsupportedModelError: there is no known final norm.
    """
    layer, d_model = layer_of(within, profile.model.layer), profile.model.d_model
    norms = dict(_norm_modules(model, d_model))
    final, parent = None, layer.rpartition(".")[0]
    # Take the nearest above the layers: encoders of images and sound have norms of their own.
    while final is None and parent:
        parent = parent.rpartition(".")[0]
        inside = (
            norm for name, norm in norms.items() if name.startswith(parent and f"{parent}.") and not re.search(r"\.\d+\.", name)
        )
        final = next(reversed([*inside]), None)
    if final is None:
        raise UnsupportedModelError(f"vLLM's {type(model).__name__} has no final norm that confsteer finds")
    write = next((norm for name, norm in norms.items() if name.startswith(f"{layer}.") and WRITE_NORM.search(name)), None)
    gain = None if write is None else read_norm(write, d_model).gain
    config: Any = getattr(model, "config", PretrainedConfig())
    multiplier = residual_multiplier(config.get_text_config(decoder=True), model.get_submodule(layer))
    return Norms(final, read_norm(final, d_model), gain, multiplier)


def check_direction(model: nn.Module, profile: Profile) -> Norms:
    """Check that the unembedding of `model` reads the null direction, and random ones, as in calibration. Return its norms.

    This is for mixtures whose experts are not looked at. Nothing else would tell whether they have the profile's weights.

    Raises:
        UnsupportedModelError: no unembedding or no final norm was found.
        ProfileMismatchError: it has other weights.
    """
    identity, direction = profile.model, profile.null_direction
    within = next((name for name, _ in model.named_modules() if f".{identity.layer}." in name), None)
    heads: list[Any] = [
        m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and m.embedding_dim == identity.d_model
    ]
    if within is None or not heads or direction is None:
        raise UnsupportedModelError(f"vLLM's {type(model).__name__} has no layer {identity.layer} or no unembedding")
    # Take the last: an unembedding of its own comes after the embedding.
    norms, head = find_norms(model, within, profile), heads[-1]
    random = torch.randn(32, identity.d_model, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([profile.columns[DIRECTION_COLUMN].float()[None], random / random.norm(dim=1, keepdim=True)])
    vectors = (vectors.to(norms.final.gain) * norms.final.gain).to(head.weight.dtype)
    first, end = head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index
    with torch.no_grad():
        logits = head.quant_method.apply(head, vectors, bias=None).float()[:, : max(0, min(end, identity.tokenizer_size) - first)]
    processor: Any = getattr(model, "logits_processor", None)
    sums = torch.stack([logits.sum(dim=1), logits.square().sum(dim=1)])
    total, squares = get_tp_group().all_reduce(sums)
    if getattr(processor, "soft_cap", None) is None:
        squares = squares - total.square() / identity.tokenizer_size  # as calibration has it, centred over the vocabulary
    lengths = squares.clamp_min(0).sqrt() * getattr(processor, "scale", 1.0)
    value, seen = float(lengths[0]), float(lengths[1:].square().mean().sqrt())
    typical = float(profile.columns["singular_values"].square().mean().sqrt())
    expected = direction.singular_value
    if not (abs(value - expected) <= QUANTISED_TOLERANCE * typical and typical / 2 <= seen <= 2 * typical):
        raise ProfileMismatchError(
            f"the profile is of {identity.id}; the unembedding that vLLM loaded reads its null direction by {value:.3g} and "
            f"others by {seen:.3g}, and not by {expected:.3g} and {typical:.3g}: it has other weights"
        )
    return norms


def layer_of(within: str, layer: int) -> str:
    """Name the layer that a module is in."""
    return f"{within.partition(f'.{layer}.')[0]}.{layer}"


def _norm_modules(model: nn.Module, d_model: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # OLMo's norms have none
        if "norm" in type(module).__name__.lower() and (weight is None or weight.shape == (d_model,)):
            yield name, module
