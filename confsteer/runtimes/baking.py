"""A steering folded into a model's weights, and checkpoints of the result."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from confsteer.errors import ResultError, SteeringError, UnsupportedModelError
from confsteer.files import sync_folder, temporary_sibling
from confsteer.model.anatomy import Anatomy
from confsteer.model.dissect import dissect
from confsteer.model.experts import MixtureAnatomy
from confsteer.model.layers import dtype_name, output_weights, without_compiler
from confsteer.model.loading import LoadedModel
from confsteer.model.locate import unwrap
from confsteer.profile.profile import Profile
from confsteer.profile.schema import Neuron
from confsteer.runtimes.linear import LinearEdit, linear_edit, no_weight
from confsteer.runtimes.transformers import Request
from confsteer.steering import Steering

RECORD_NAME = "confsteer.json"
"""File in a baked checkpoint that says what it was made from. Nothing reads it."""


class Baked(NamedTuple):
    """The changes that `bake` made."""

    steering: Steering
    """The steering, with its preset written out."""
    neurons: tuple[int, ...]
    """Indices of the neurons that are steered."""
    weight: str | None
    """Name of the parameter with their output weights; None if those are unchanged. With another in shared experts it is
    ``NAME and NAME``."""
    bias: str | None
    """Name of the parameter that holds the constant part now. None if there is none."""
    mlp_bias_added: bool
    """Whether ``mlp_bias`` was off in the model's config. Then all its MLPs have biases now, and all but this one are zero."""


def bake(model: nn.Module, profile: Profile | str | os.PathLike[str], steering: Request) -> Baked:
    """Fold `steering` into the weights of `model`. The model then computes by itself what it would under `confsteer.steer`.

    **The model is changed in place, for good.** If an error is raised, it is unchanged. ``model.save_pretrained`` saves an
    ordinary checkpoint.

        confsteer.bake(model, profile, {"entropy": 0.3})

    A neuron's output weights are multiplied by its gain. The constant part, Σ bias · (original output weights), is added to the
    projection's bias. A projection without a bias gets one if the config can say so (``mlp_bias``: Llama, Granite, SmolLM3).
    Elsewhere only steerings without a constant part can be baked. The constant of a null direction is added there too, if no
    norm stands between the projection and the residual.

    In a mixture of experts only gains can be baked, because the routing weight multiplies everything that an expert adds.

    The arithmetic is float64, rounded once to the weights' precision. In bfloat16 that is up to 0.2 % of each weight. It is also
    up to 0.2 % of each entry of the *sum* of the projection's own bias and the constant. So a constant much smaller than that
    bias is lost. `confsteer.steer` rounds each steered activation instead. Load the model in float32 to keep all digits.

    After output weights have changed, the profile does not fit the model. A steering that only adds (dials, shifts) changes only
    a bias, and the profile still fits. A later steering is then added to the baked one.

    Args:
        model: a transformers causal language model with ordinary weights, all in memory.
        profile: the model's profile, or a source that `Profile.load` takes.
        steering: a `Steering`, or a request that `Steering.parse` takes.

    Raises:
        SteeringError: the request is malformed, out of reach, changes nothing, or is not linear in the activations at all
            positions. Or it has a constant part, and the projection has no bias, or a norm that the constant belongs after.
        NoNeuronsError: the profile has no neurons to turn.
        ProfileMismatchError: the profile is of another model.
        UnsupportedModelError: see `confsteer.model.dissect`. Or weights are quantised, shared, offloaded or under adapters.
    """
    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    steering = profile.resolve(Steering.parse(steering))
    edit = linear_edit(steering, profile)
    base = unwrap(model)
    if without_compiler(model) is not base or any(hasattr(module, "base_layer") for module in base.modules()):
        raise UnsupportedModelError(
            "the model has adapters (PEFT), which are not part of its weights: merge them first, model = "
            "model.merge_and_unload(), and calibrate the merged model"
        )
    anatomy = dissect(model)
    profile.check_model(anatomy)
    _check_weights(base, anatomy)
    if edit.residual.any() and (anatomy.write_norm is not None or isinstance(anatomy, MixtureAnatomy)):
        raise no_weight(steering, profile)
    if isinstance(anatomy, MixtureAnatomy):
        return _bake_experts(base, anatomy, profile, steering, edit)

    # Compute the new rows and the new bias, and refuse before anything is changed.
    projection: Any = anatomy.down_proj
    index = edit.neurons
    with torch.no_grad():
        # Take a view: writing into it changes the weight.
        w_out = output_weights(projection)
        rows = w_out[index.to(w_out.device)].cpu()
        constant = edit.constant(rows) + edit.residual / anatomy.residual_multiplier
        baked_rows = (edit.gain[:, None] * rows.double()).to(rows.dtype)
        bias = torch.zeros_like(constant, dtype=rows.dtype) if projection.bias is None else projection.bias.cpu()
        baked_bias = (bias.double() + constant).to(bias.dtype)
        weight_changes, bias_changes = not torch.equal(baked_rows, rows), not torch.equal(baked_bias, bias)
        _check_changes(steering, rows.dtype, weight_changes or bias_changes, baked_rows, baked_bias)

        # Change the model, and first give it a bias if it has a place for one.
        without_bias: list[nn.Linear] = []
        if projection.bias is None and bias_changes:
            without_bias = _layers_of_mlp_bias(base)
            if projection not in without_bias:
                raise _no_place_for_a_constant(steering, profile)
            for layer in without_bias:
                zeros = layer.weight.new_zeros(layer.out_features)
                layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
            base.config.get_text_config().mlp_bias = True
        w_out[index.to(w_out.device)] = baked_rows.to(w_out.device)
        if projection.bias is not None:
            projection.bias.copy_(baked_bias)
    name = next(name for name, module in base.named_modules() if module is projection)
    return Baked(
        steering=steering,
        neurons=edit.changed,
        weight=f"{name}.weight" if weight_changes else None,
        bias=f"{name}.bias" if bias_changes else None,
        mlp_bias_added=bool(without_bias),
    )


def _bake_experts(
    base: PreTrainedModel, anatomy: MixtureAnatomy, profile: Profile, steering: Steering, edit: LinearEdit
) -> Baked:
    """Multiply the output weights of experts' neurons by their gains.

    The routing weight multiplies everything that an expert adds, also a bias. So no weight of an expert adds a constant.

    Raises:
        SteeringError: there is a constant, or nothing changes.
    """
    if constant := [neuron for neuron, added in zip(profile.steerable, edit.bias.tolist(), strict=True) if added]:
        raise SteeringError(
            f"{steering}: adds a constant where neuron {', '.join(str(neuron.key) for neuron in constant)} is active, and the "
            f"routing weight multiplies all that an expert of {profile.model.id} adds, so that no weight of it is a constant. "
            f"{_without_a_constant(constant[0])}"
        )
    index, changed = edit.neurons, (edit.gain != 1).nonzero()[:, 0]
    with torch.no_grad():
        rows = anatomy.w_out(index).cpu()
        baked = (edit.gain[:, None] * rows.double()).to(rows.dtype)
        _check_changes(steering, rows.dtype, not torch.equal(baked, rows), baked)
        for i in changed.tolist():
            anatomy.row(int(index[i])).copy_(baked[i])
    modules = {anatomy.down_proj if i < anatomy.experts.n_routed else anatomy.shared for i in index[changed].tolist()}
    names = [name for name, module in base.named_modules() if module in modules]
    weights = [f"{name}.down_proj" if base.get_submodule(name) is anatomy.down_proj else f"{name}.weight" for name in names]
    return Baked(steering, tuple(index[changed].tolist()), " and ".join(weights), None, False)


def _check_changes(steering: Steering, dtype: torch.dtype, changes: bool, *baked: Tensor) -> None:
    """
    Raises:
        SteeringError: nothing changes, or the new weights are not finite.
    """
    if not changes:
        raise SteeringError(
            f"{steering}: changes nothing in the {dtype_name(dtype)} weights of this model; there is nothing to bake"
        )
    if not all(weights.isfinite().all() for weights in baked):
        raise SteeringError(
            f"{steering}: makes weights that {dtype_name(dtype)} cannot hold. Ask for less, or load the model in float32"
        )


def _check_weights(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """
    Raises:
        UnsupportedModelError: the last projection cannot be changed, or a change would also change something else.
    """
    model_type = base.config.model_type
    if anatomy.quantised:
        raise UnsupportedModelError(
            f"this {model_type} is quantised: load it unquantised, bake, and quantise the baked checkpoint"
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise UnsupportedModelError(
            f"weights of this {model_type} are offloaded; load it whole into memory, such as with device_map='cpu' (on the "
            "command line --device cpu)"
        )
    own = {id(parameter) for module in anatomy.projections for parameter in module.parameters()}
    sharing = [name for name, parameter in base.named_parameters(remove_duplicate=False) if id(parameter) in own]
    if len(sharing) > len(own):
        raise UnsupportedModelError(
            f"the last MLP projection of this {model_type} shares its parameters ({', '.join(sharing)}): to bake would change "
            "more than the last layer"
        )


def _layers_of_mlp_bias(base: PreTrainedModel) -> list[nn.Linear]:
    """List the layers that would have a bias if ``mlp_bias`` were on in the model's config. Empty if it has no such flag."""
    config = copy.deepcopy(base.config)
    text_config = config.get_text_config()
    if getattr(text_config, "mlp_bias", None) is not False:
        return []
    text_config.mlp_bias = True
    with torch.device("meta"):
        biased = type(base)(config)
    layers: list[nn.Linear] = []
    for name, module in biased.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            layer = base.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            if layer.bias is None:
                layers.append(layer)
    return layers


def _no_place_for_a_constant(steering: Steering, profile: Profile) -> SteeringError:
    why = (
        f"{steering}: adds a constant, and the last MLP projection of {profile.model.id} ({profile.model.model_type}) has no "
        "bias to hold it."
    )
    if profile.null_direction is not None:
        return SteeringError(f"{why} Steer while the model runs: confsteer.steer")
    return SteeringError(f"{why} {_without_a_constant(profile.steerable[0])}")


def _without_a_constant(neuron: Neuron) -> str:
    cancelling = f"scale.{neuron.key}=0.5 shift.{neuron.key}={-0.5 * neuron.mean_activation!r}"
    runs = "confsteer serve" if neuron.name is None else "confsteer.steer"
    return (
        f"What can be baked here multiplies activations: clamp.{neuron.key}=0, or a scale whose constant a shift takes away, "
        f"{cancelling}. Steer with anything else while the model runs: {runs}"
    )


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder to write into. It becomes `path` at the end of the context, or is removed after an exception.

    Whenever the process dies, `path` is the whole folder or what it was before. A killed process leaves a folder beside it,
    which the next one that writes there removes.

    Raises:
        ResultError: there is something at `path` already, or it cannot be written to.
    """
    folder = Path(path).resolve()
    try:
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            raise ResultError(f"{folder} exists and is not an empty folder; nothing is written over: give another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(folder, folder=True) as written:
            yield written
            # Let others read the files: safetensors writes them for their owner only, and servers run as someone else.
            written.chmod(0o755)
            for file in written.iterdir():
                file.chmod(0o644)
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            sync_folder(written)
            written.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {error.strerror or error}") from error


def save(loaded: LoadedModel, baked: Baked, profile: Profile, folder: Path) -> None:
    """Write a baked model with its tokenizer as a checkpoint of safetensors and JSON, with a record of what it was made from.

    Raises:
        UnsupportedModelError: the model or its tokenizer has code of its own.
        ResultError: it cannot be written.
    """
    record = {
        "base_model": profile.model.id,
        "revision": profile.model.revision,
        "profile": profile.checksum,
        "steering": baked.steering.model_dump(mode="json", exclude_defaults=True),
    }
    try:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError, SafetensorError) as error:
        raise ResultError(f"cannot save the baked model: {error}") from error
    if code := sorted(file.name for file in folder.rglob("*.py")):
        raise UnsupportedModelError(
            f"{profile.model.id} runs code of its own ({', '.join(code)}), and a baked checkpoint holds none: load it without "
            "trust_remote_code if transformers knows the model, or bake in Python and save it yourself"
        )
