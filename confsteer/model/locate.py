"""The search for the modules at the end of a model, by the modules that it calls and their order."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from confsteer.errors import ConfsteerError, UnsupportedModelError
from confsteer.model.anatomy import Anatomy
from confsteer.model.experts import find_experts, norm_after, with_experts
from confsteer.model.factors import read_factors
from confsteer.model.layers import execution_device, sizes, without_adapter, without_compiler

SPREAD = 1e-2
"""Least relative change of an input that shows that it depends on the disturbed position."""

PROBE_SHAPE = (2, 8)
"""Number of texts, and tokens of each, that the model is tried on."""

_stance = threading.Lock()


class Places(NamedTuple):
    """Paths in a `PreTrainedModel`; `down_proj` and `write_norm` are inside the last layer."""

    layers: str
    layer: int
    """Index of the last layer."""
    depth: int
    """Number of layers."""
    down_proj: str
    final_norm: str
    write_norm: str | None


_found: weakref.WeakKeyDictionary[nn.Module, Places] = weakref.WeakKeyDictionary()


def locate(model: nn.Module) -> Anatomy:
    """Find the modules by one or two short forward passes, once per model. Nothing is proved numerically here.

    Only modules that run on a text are looked at, so a multimodal model is its language model.

    Raises:
        UnsupportedModelError: the model has no such structure, or a structure that cannot fit.
    """
    base = unwrap(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{base.config.model_type} is an encoder-decoder; confsteer steers decoder-only causal language models"
        )
    unembedding = _unembedding(base)
    places = _found.get(base)
    if places is None or not _still_there(base, places):
        places = _found[base] = _search(base, unembedding)
    config = base.config.get_text_config(decoder=True)
    last_layer = _submodule(base, f"{places.layers}.{places.layer}")
    factors = read_factors(base, config, last_layer)
    anatomy = Anatomy(
        layer=places.layer,
        last_layer=last_layer,
        down_proj=_submodule(last_layer, places.down_proj),
        final_norm=_submodule(base, places.final_norm),
        unembedding=without_compiler(unembedding),
        logit_scale=factors.logit_scale,
        residual_multiplier=factors.residual_multiplier,
        softcap=factors.softcap,
        write_norm=None if places.write_norm is None else _submodule(last_layer, places.write_norm),
    )
    return with_experts(anatomy, config) if find_experts(last_layer, config.model_type) else anatomy


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
    """Find the device for token ids."""
    return execution_device(base.get_input_embeddings())


def _unembedding(base: PreTrainedModel) -> nn.Module:
    """Find the unembedding of a model, or of the language model inside it.

    Raises:
        UnsupportedModelError: there is none.
    """
    heads: Iterator[Any] = (model.get_output_embeddings() for _, model in _models(base))
    unembedding: nn.Module | None = next((head for head in heads if head is not None), None)
    if unembedding is None:
        raise UnsupportedModelError(f"{type(base).__name__} has no unembedding: it is not a causal language model")
    return unembedding


def _models(base: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """List the models inside a model by path, the model itself first."""
    yield from ((path, module) for path, module in base.named_modules() if isinstance(module, PreTrainedModel))


def _submodule(parent: nn.Module, path: str) -> nn.Module:
    return without_compiler(parent.get_submodule(path))


def _still_there(base: PreTrainedModel, places: Places) -> bool:
    """Whether the paths lead to modules, and the last layer is still the last."""
    try:
        layers, last_layer = base.get_submodule(places.layers), _submodule(base, f"{places.layers}.{places.layer}")
        for parent, path in ((base, places.final_norm), (last_layer, places.down_proj), (last_layer, places.write_norm)):
            parent.get_submodule(path or "")
    except AttributeError:
        return False
    return isinstance(layers, nn.ModuleList) and len(layers) == places.depth


class _Call(NamedTuple):
    """A linear layer or norm that ran."""

    path: str
    module: nn.Module
    passed: Tensor | None
    """Input of a norm; output of a linear layer."""


def _search(base: PreTrainedModel, unembedding: nn.Module) -> Places:
    """Find the last projection, the norm on its output and the final norm by the order of calls.

    The last layer is the element of a list of modules that runs last before the unembedding. The final norm is the last norm
    before the unembedding.

    Raises:
        UnsupportedModelError: one of them is missing, or something else computes between them.
    """
    name = base.config.model_type
    calls = _calls(base, unembedding)
    lists = {path.replace("_orig_mod.", "") for path, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    of_layers = [i for i, call in enumerate(calls) if _is_linear(call.module) and _element(call.path, lists)]
    if not of_layers:
        raise UnsupportedModelError(f"{type(base).__name__} has no layers: no list of modules takes part in reading a text")
    element = _element(calls[of_layers[-1]].path, lists)
    last_layer = _submodule(base, element)
    if head := [call.path for call in calls[of_layers[-1] + 1 :] if _is_linear(call.module)]:
        raise UnsupportedModelError(
            f"{name} has no final norm before its unembedding: a layer of its own ({head[-1]}) stands between the last "
            "transformer layer and the unembedding, such as encoder-style models have"
        )
    residual = next((call.passed for call in reversed(calls) if _is_norm(call.module)), None)
    if isinstance(residual, Tensor) and residual.shape[:-1] not in (PROBE_SHAPE, (math.prod(PROBE_SHAPE),)):
        raise UnsupportedModelError(
            f"{name} does not have one residual for each token in the order of the text: of ids {list(PROBE_SHAPE)} the final "
            f"norm reads {list(residual.shape)}"
        )
    layers, _, layer = element.rpartition(".")
    stack = base.get_submodule(layers)
    assert isinstance(stack, nn.ModuleList)
    if experts := find_experts(last_layer, name):
        norms = [call.path for call in calls if _is_norm(call.module) and not call.path.startswith(f"{element}.")]
        if not norms:
            raise UnsupportedModelError(
                f"{name} has no final norm: no module whose class has norm in its name runs before its unembedding"
            )
        return Places(layers, int(layer), len(stack), experts, norms[-1], norm_after(last_layer))
    down_proj, final_norm, write_norm = _around_mlp(base, element, calls)
    return Places(layers, int(layer), len(stack), down_proj, final_norm, write_norm)


def _around_mlp(base: PreTrainedModel, element: str, calls: Sequence[_Call]) -> tuple[str, str, str | None]:
    """Find the last projection, the final norm, and the norm on the projection's output (if there is one).

    Returns:
        Their paths, those of the first and the third inside the last layer.

    Raises:
        UnsupportedModelError: one of them is missing, or something else computes between them.
    """
    inside = [call for call in calls if call.path.startswith(f"{element}.") and _is_linear(call.module)]
    projection = _projection(base, element, inside)
    after = calls[max(i for i, call in enumerate(calls) if call.module is projection.module) + 1 :]
    norms = [call for call in after if _is_norm(call.module)]
    if not norms:
        raise UnsupportedModelError(
            f"{base.config.model_type} has no final norm: no module whose class has norm in its name runs between its last MLP "
            "and its unembedding"
        )
    _refuse_more(base, element, projection, [call for call in after if _is_linear(call.module)])
    write_norm = next((norm for norm in norms[:-1] if norm.path.startswith(f"{element}.") and _same(norm, projection)), None)
    inner = len(f"{element}.")
    return projection.path[inner:], norms[-1].path, None if write_norm is None else write_norm.path[inner:]


def _calls(base: PreTrainedModel, unembedding: nn.Module) -> list[_Call]:
    """Run the model once on a text. List its linear layers and norms in the order in which they ran, up to the unembedding.

    Raises:
        UnsupportedModelError: it cannot read a text alone.
    """
    calls: list[_Call] = []
    head = without_compiler(unembedding)
    with contextlib.ExitStack() as stack:
        for path, module in _parts(base):

            def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                passed = output if _is_linear(module) else next(iter(args), None)
                # Drop the logits: they are large, and not used.
                calls.append(_Call(path, module, None if module is head else passed))

            if module is head or _is_linear(module) or _is_norm(module):
                stack.callback(module.register_forward_hook(note).remove)
        try:
            _run(base, probe_ids(sizes(unembedding)[1]), calls)
        except (ConfsteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model raises that needs an image, a language or another library
            words = " ".join(str(error).split())[:200] or type(error).__name__
            if input_device(base).type == "meta":
                raise UnsupportedModelError(
                    f"{type(base).__name__} cannot be laid out without its weights ({words}), so its last layer cannot be found "
                    "on disk alone. Try confsteer calibrate, which loads the whole model"
                ) from error
            inner = next((path for path, model in _models(base) if path and model.get_output_embeddings() is not None), None)
            hint = "" if inner is None else f". Give the language model inside it: model.{inner}"
            raise UnsupportedModelError(
                f"{type(base).__name__} does not run on the ids of a text alone: {words}{hint}"
            ) from error
    heads = [i for i, call in enumerate(calls) if call.module is head]
    if not heads:
        raise UnsupportedModelError(f"{base.config.model_type} does not use its unembedding ({type(head).__name__})")
    return calls[: heads[-1]]


def _run(base: PreTrainedModel, ids: Tensor, calls: list[_Call]) -> None:
    """Run the model. On the meta device, hybrid layers read the values of the mask, so it is on the CPU; others do not."""
    if input_device(base).type != "meta":
        probe_logits(base, ids)
        return
    try:
        probe_logits(base, ids, mask_on="cpu")
    except RuntimeError:
        calls.clear()
        probe_logits(base, ids)


def _parts(module: nn.Module, path: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """List the modules without modules inside, by path. An adapter and its layer count as one. Compiler wrappers are skipped."""
    seen = set() if seen is None else seen
    module = without_compiler(module)
    if module in seen:
        return
    seen.add(module)
    children = () if _is_linear(module) else module.named_children()
    whole = True
    for name, child in children:
        whole = False
        yield from _parts(child, f"{path}.{name}" if path else name, seen)
    if whole:
        yield path, module


def _element(path: str, lists: Collection[str]) -> str:
    """Find the element of the outermost list of modules that contains a module. It is empty if no list does."""
    parts = path.split(".")
    places = (i for i in range(1, len(parts) - 1) if ".".join(parts[:i]) in lists)
    first = next(places, None)
    return "" if first is None else ".".join(parts[: first + 1])


def _projection(base: PreTrainedModel, element: str, linears: Sequence[_Call]) -> _Call:
    """Find the output projection of the last MLP among the linear layers of the last layer, in the order in which they ran.

    It is the widest one that ends a block of the layer. It reads nothing from other positions: projections of attention and
    state-space layers do.

    Raises:
        UnsupportedModelError: there is none.
    """
    name, d_model = base.config.model_type, sizes(_unembedding(base))[0]
    ends = {call.path.rpartition(".")[0]: call for call in linears}.values()
    candidates = [call for call in ends if sizes(call.module)[1] == d_model]
    if not candidates:
        raise UnsupportedModelError(f"the last layer of {name} has no MLP: nothing in {element} writes to the residual")
    # Take the last of equally wide ones, which comes after attention.
    for _, call in sorted(enumerate(candidates), key=lambda entry: (sizes(entry[1].module)[0], entry[0]), reverse=True):
        if not _mixes_positions(base, element, call):
            return call
    last = candidates[-1].path.removeprefix(f"{element}.")
    raise UnsupportedModelError(
        f"the last layer of {name} has no MLP: its last projection ({last}) reads what was gathered from other positions, as in "
        "attention and state-space layers; confsteer steers the neurons of an MLP"
    )


def _mixes_positions(base: PreTrainedModel, element: str, projection: _Call) -> bool:
    """Test whether a projection's input depends on other positions through its block. In an MLP it never does.

    On the meta device there are no numbers to compare, so the kind of block decides.
    """
    parent, width = projection.path.rpartition(".")[0], sizes(projection.module)[0]
    block, divided = _submodule(base, parent), parent != element
    if _is_meta(projection):
        return divided and any(type(m) is nn.Conv1d or "Attention" in type(m).__name__ for m in block.modules())
    # In a layer without blocks, leave out the projections of attention: they stand beside the MLP's, and are narrower.
    inside = (m for path, m in _parts(block) if _is_linear(m) and (divided or "." not in path))
    sources = [m for m in inside if m is not projection.module and (divided or sizes(m)[1] >= width)]
    return _spread(base, sources, projection.module)[1:].amax().item() > SPREAD


def _refuse_more(base: PreTrainedModel, element: str, projection: _Call, later: Sequence[_Call]) -> None:
    """
    Raises:
        UnsupportedModelError: the last layer reads what its MLP has written, and computes on.
    """
    for call in later:
        # Allow for attention beside the MLP: in some models it runs after it.
        if _is_meta(call) or _spread(base, [projection.module], call.module)[0].item() > SPREAD:
            raise UnsupportedModelError(
                f"the last layer of {base.config.model_type} computes on after its MLP: {call.path.removeprefix(element + '.')} "
                "reads what the MLP has written, so a neuron moves the residual by more than its output weights"
            )


def _spread(base: PreTrainedModel, sources: Iterable[nn.Module], reader: nn.Module) -> Tensor:
    """Disturb the output of some linear layers at the first position, and measure how the input of another changes.

    There are two equal texts, and the second is disturbed. The change, ``[positions]``, is relative to the length of the input.
    """
    ids = probe_ids(sizes(_unembedding(base))[1])[:1].repeat(2, 1)
    seen: list[Tensor] = []

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        disturbed = output.clone().reshape(2, -1, output.shape[-1])
        # Disturb in a direction that no norm takes away.
        ramp = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        disturbed[1, 0] += (1 + output.abs().max()) * ramp
        return disturbed.reshape(output.shape)

    def see(module: nn.Module, args: Any) -> None:
        seen.append(args[0].reshape(2, -1, args[0].shape[-1]).float())

    with contextlib.ExitStack() as stack:
        for module in sources:
            stack.callback(module.register_forward_hook(disturb).remove)
        stack.callback(reader.register_forward_pre_hook(see).remove)
        probe_logits(base, ids)
    first, second = seen[-1]
    change: Tensor = (second - first).norm(dim=-1) / first.norm(dim=-1).clamp_min(1e-12)
    return change


def _same(norm: _Call, projection: _Call) -> bool:
    """Whether a norm reads the output of a projection, and nothing else."""
    read, written = norm.passed, projection.passed
    if not (isinstance(read, Tensor) and isinstance(written, Tensor)) or read.numel() != written.numel():
        return False
    return read is written if read.is_meta else torch.equal(read.reshape(written.shape), written.to(read.device))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_linear(module: nn.Module) -> bool:
    inner = without_adapter(module)
    return isinstance(inner, Conv1D) or isinstance(getattr(inner, "in_features", None), int)


def _is_meta(call: _Call) -> bool:
    return isinstance(call.passed, Tensor) and call.passed.is_meta


def probe_ids(vocab_size: int) -> Tensor:
    """Draw the ids of short texts, `PROBE_SHAPE`, from the middle of the vocabulary: ids that mean images are at its ends."""
    low, high = vocab_size // 4, max(vocab_size // 4 + 1, 3 * vocab_size // 4)
    return torch.randint(low, high, PROBE_SHAPE, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled functions as they were written, where torch can (2.6)."""
    # Take a lock: the stance is the whole process's, and a second thread would restore what the first had set.
    with _stance, getattr(torch.compiler, "set_stance", contextlib.nullcontext)("force_eager"):
        yield


def probe_logits(base: PreTrainedModel, ids: Tensor, mask_on: str | None = None) -> Tensor:
    """Compute logits ``[batch, positions, vocab]`` in evaluation mode. Every module's mode is restored.

    Nothing runs compiled, because compiled code does not know of later hooks. A mask is given because models otherwise look for
    padding in the ids, which have no values on the meta device.
    """
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        with torch.no_grad(), eagerly():
            ids = ids.to(input_device(base))
            mask = torch.ones_like(ids, device=mask_on or ids.device)
            logits: Tensor = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits
    finally:
        for module, mode in modes:
            module.training = mode
