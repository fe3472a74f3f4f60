"""The search for the modules at the end of a model: by the table of families, or by the model's structure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from confsteer.errors import UnsupportedModelError
from confsteer.model.anatomy import Anatomy
from confsteer.model.experts import find_experts, norm_after, norm_beside, with_experts
from confsteer.model.families import FAMILIES, Family
from confsteer.model.layers import execution_device, sizes, without_adapter, without_compiler

_stance = threading.Lock()


def locate(model: nn.Module) -> Anatomy:
    """Find the modules by the table of families, or by their structure; nothing is checked numerically here.

    Raises:
        UnsupportedModelError: the model has no such structure, or one that is known not to fit.
    """
    base = unwrap(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder; confsteer steers decoder-only causal language models"
        )
    unembedding = base.get_output_embeddings()
    if unembedding is None:
        raise UnsupportedModelError(f"{type(base).__name__} has no unembedding: it is not a causal language model")
    family = FAMILIES.get(config.model_type)
    _check_not_inside(base, config, family)
    layers = _last_layers(base, family)
    last_layer = without_compiler(layers[-1])
    experts = find_experts(last_layer, config.model_type)
    if experts is not None:
        down_proj, write_norm, final_norm = experts, norm_after(last_layer), norm_beside(layers, base)
    elif family is not None:
        down_proj = _submodule(last_layer, family.down_proj)
        final_norm = _submodule(base, family.final_norm)
        write_norm = None if family.write_norm is None else _submodule(last_layer, family.write_norm)
    else:
        down_proj, write_norm, final_norm = _search(base, last_layer, unembedding)
    anatomy = Anatomy(
        layer=len(layers) - 1,
        last_layer=last_layer,
        down_proj=down_proj,
        final_norm=final_norm,
        unembedding=without_compiler(unembedding),
        logit_scale=getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0),
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        write_norm=write_norm,
    )
    return anatomy if experts is None else with_experts(anatomy, config)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Find the transformers model inside a PEFT or `torch.compile` wrapper, or the model itself.

    Raises:
        UnsupportedModelError: there is none.
    """
    inner: Any = without_compiler(model)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model")
    return inner


def input_device(base: PreTrainedModel) -> torch.device:
    """Find where token ids go."""
    return execution_device(base.get_input_embeddings())


def _check_not_inside(base: PreTrainedModel, config: Any, family: Family | None) -> None:
    """
    Raises:
        UnsupportedModelError: the family's language model is a part of this one, beside those that see or hear.
    """
    if family is None or config is base.config or _has(base, family.layers):
        return
    raise UnsupportedModelError(
        f"{type(base).__name__} ({base.config.model_type}) is a multimodal model around {config.model_type}: confsteer steers "
        f"{config.model_type} on its own, for texts. Give a checkpoint of the language model alone"
    )


def _has(parent: nn.Module, path: str) -> bool:
    try:
        parent.get_submodule(path)
    except AttributeError:
        return False
    return True


def _submodule(parent: nn.Module, path: str) -> nn.Module:
    try:
        return without_compiler(parent.get_submodule(path))
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(parent).__name__} has no {path}") from error


def _last_layers(base: PreTrainedModel, family: Family | None) -> nn.ModuleList:
    """Find the stack of transformer layers: by the table, or the longest list of modules."""
    if family is not None:
        layers = _submodule(base, family.layers)
        if len(layers) == 0:  # type: ignore[arg-type]
            raise UnsupportedModelError(f"{type(base).__name__} has no layers")
    else:
        stacks = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        if not stacks:
            raise UnsupportedModelError(f"{type(base).__name__} has no list of transformer layers")
        layers = max(stacks, key=len)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _search(
    base: PreTrainedModel, last_layer: nn.Module, unembedding: nn.Module
) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    """Find the last projection, the norm on its output and the final norm by the order of calls.

    The final norm is the last module before the unembedding that is callable on the residual as a norm; the projection
    is the last ``Linear`` of the last layer that maps a wider space to ``d_model``. A norm of the layer that is called
    after the projection stands between it and the residual.
    """
    d_model, vocab_size = sizes(unembedding)
    calls: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(module)

    with contextlib.ExitStack() as stack:
        for module in base.modules():
            if next(module.children(), None) is None or isinstance(module, Conv1D | nn.Linear):
                stack.callback(module.register_forward_hook(note).remove)
        probe_logits(base, probe_ids(vocab_size))
    in_last_layer = set(last_layer.modules())
    projections = [m for m in calls if m in in_last_layer and _maps_to(m, d_model)]
    norms = [m for m in calls if m not in in_last_layer and m is not unembedding and _is_norm(m)]
    if not projections or not norms:
        missing = "MLP output projection" if not projections else "final norm"
        raise UnsupportedModelError(
            f"{base.config.model_type} is not a family confsteer knows, and no {missing} was found in its structure"
        )
    last = max(i for i, module in enumerate(calls) if module is projections[-1])
    write_norm = next((m for m in calls[last + 1 :] if m in in_last_layer and _is_norm(m)), None)
    # An adapter reads the activations beside the projection inside of it.
    adapters = (m for m in in_last_layer if without_adapter(m) is projections[-1] is not m)
    projection = next(adapters, projections[-1])
    name = next(name for name, module in last_layer.named_modules() if module is projection)
    if _mixes_positions(base, last_layer, projection, name):
        raise UnsupportedModelError(
            f"the last layer of {base.config.model_type} has no MLP: its last projection ({name}) reads what was gathered from "
            "other positions, as in attention and state-space layers; confsteer steers the neurons of an MLP"
        )
    return projection, write_norm, norms[-1]


def _mixes_positions(base: PreTrainedModel, last_layer: nn.Module, projection: nn.Module, name: str) -> bool:
    """Try whether the projection's input depends on what its block makes of other positions, as that of no MLP does.

    Two equal texts; in the second, everything that the block's linear layers say of the first position is disturbed. On the
    meta device, where there is nothing to compare, the kind of block decides.
    """
    block = last_layer.get_submodule(name.rpartition(".")[0])
    divided = block is not last_layer
    if next(projection.parameters()).is_meta:
        return divided and any(type(m) is nn.Conv1d or "Attention" in type(m).__name__ for m in block.modules())
    width, own = sizes(without_adapter(projection))[0], set(projection.modules())
    # A layer that is not divided into blocks has its attention's projections, which are narrower, beside those of the MLP.
    inside = (m for m in (block.modules() if divided else block.children()) if isinstance(m, Conv1D | nn.Linear) and m not in own)
    before = [m for m in inside if divided or sizes(m)[1] >= width]
    ids = probe_ids(sizes(base.get_output_embeddings())[1])[:1].repeat(2, 1)
    seen: list[Tensor] = []

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        disturbed = output.clone()
        disturbed.view(-1, output.shape[-1])[ids.shape[1]] += 1 + output.abs().max()
        return disturbed

    def see(module: nn.Module, args: Any) -> None:
        seen.append(args[0].reshape(-1, width).float())

    with contextlib.ExitStack() as stack:
        for module in before:
            stack.callback(module.register_forward_hook(disturb).remove)
        stack.callback(projection.register_forward_pre_hook(see).remove)
        probe_logits(base, ids)
    first, second = (rows[1:] for rows in seen[-1].split(ids.shape[1]))
    return not float((first - second).norm()) <= 1e-2 * float(first.norm())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _maps_to(module: nn.Module, d_model: int) -> bool:
    return isinstance(module, Conv1D | nn.Linear) and sizes(module)[1] == d_model < sizes(module)[0]


def probe_ids(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (2, 8), generator=torch.Generator("cpu").manual_seed(0), device="cpu")


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled functions as they were written, where torch can (2.6)."""
    # The stance is the whole process's: of two threads the later one would restore what the earlier one set.
    with _stance, getattr(torch.compiler, "set_stance", contextlib.nullcontext)("force_eager"):
        yield


def probe_logits(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute logits ``[batch, positions, vocab]`` in evaluation mode; every module's mode is put back.

    Nothing runs compiled, for code compiled before does not know of hooks that came since. The mask says what models
    otherwise look for in the ids, which have no values on the meta device.
    """
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        with torch.no_grad(), eagerly():
            ids = ids.to(input_device(base))
            logits: Tensor = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits
    finally:
        for module, mode in modes:
            module.training = mode
