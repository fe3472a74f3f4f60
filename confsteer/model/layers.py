"""Any linear layer or norm as tensors: plain, quantised, offloaded or under an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.readout import NormParameters

UNITS_AT_ONCE = 1024
"""Rows of the identity that are given to a quantised layer at a time."""


def read_norm(norm: nn.Module, d_model: int) -> NormParameters:
    """Read kind, gain, bias and epsilon of a norm, judged by what it computes, not by its name.

    LayerNorm and RMSNorm, with gain ``weight``, ``1 + weight`` (Gemma) or none, are compared with the module itself.

    Raises:
        UnsupportedModelError: it computes none of these.
    """
    with on_device(norm), torch.no_grad(), own_arithmetic(norm):
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        like = weight if weight is not None else torch.ones(d_model, dtype=torch.float32, device="cpu")
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(4, d_model, generator=generator, dtype=torch.float32, device="cpu") + 0.5
        # Include small rows, so that epsilon counts. Not in float16: some implementations would underflow their squares.
        probe[2:] *= 1e-2
        probe = probe.to(like.device, like.dtype)
        answer = norm(probe)
        # vLLM's fused norms return (output, residual).
        expected = (answer[0] if isinstance(answer, tuple) else answer).float()
        epsilon = next((float(getattr(norm, n)) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-5)
        one = torch.ones(d_model, dtype=torch.float32, device=like.device)
        gains = [one] if weight is None else [weight.float(), 1 + weight.float()]
        tolerance = 1e-4 if like.dtype == torch.float32 else 2e-2
        # Take the nearest: where gains are in the hundreds, a difference of one is within the rounding of half precision.
        nearest, least = None, tolerance * float(expected.norm())
        for centred in (True, False):
            x = probe.float()
            x = x - x.mean(dim=-1, keepdim=True) if centred else x
            x = x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
            for gain in gains:
                ours = x * gain + (0 if bias is None else bias.float())
                if (error := float((ours - expected).norm())) <= least:
                    nearest, least = (gain, centred), error
    if nearest is not None:
        gain, centred = nearest
        return NormParameters(gain.clone(), None if bias is None else bias.float().clone(), epsilon, centred)
    raise UnsupportedModelError(
        f"the norm {type(norm).__name__} computes neither a LayerNorm nor an RMSNorm of its weight, its bias and its eps (or "
        "variance_epsilon)"
    )


def output_weights(projection: nn.Module) -> Tensor:
    """Read how much a unit of each input adds to the output of a linear layer, ``[inputs, outputs]``.

    Quantised weights come in many layouts, but every layer can be run. Its output on a unit input, less its output on zero, is
    the row as the model itself uses it.
    """
    projection = without_adapter(projection)
    if is_plain(projection):
        weight = weight_of(projection).detach()
        return weight if isinstance(projection, Conv1D) else weight.T
    inputs, _ = sizes(projection)
    floating = (t for t in (*projection.parameters(), *projection.buffers()) if t.is_floating_point())
    like = next(floating, torch.ones((), dtype=torch.float32, device="cpu"))
    with torch.no_grad(), own_arithmetic(projection):
        nothing = projection(torch.zeros(1, inputs, device=like.device, dtype=like.dtype))
        units = torch.eye(inputs, device=like.device, dtype=like.dtype).split(UNITS_AT_ONCE)
        return torch.cat([projection(rows) - nothing for rows in units])


def is_plain(module: nn.Module) -> bool:
    """Whether the weight of a layer is an ordinary matrix."""
    weight = getattr(without_adapter(module), "weight", None)
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()


def sizes(module: nn.Module) -> tuple[int, int]:
    """Count the inputs and outputs of a linear layer."""
    module = without_adapter(module)
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    raise UnsupportedModelError(f"{type(module).__name__} is not a linear layer that says its sizes")


def weights_version(module: nn.Module) -> tuple[Any, ...]:
    """Give a version of a layer's weights, which differs after they change."""
    module = without_adapter(module)
    tensors = (*module.parameters(), *module.buffers())
    return tuple((id(t), None if t.is_inference() else t._version) for t in tensors)


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def without_adapter(module: nn.Module) -> nn.Module:
    """Find the layer inside a PEFT adapter layer, or the layer itself."""
    inner = without_compiler(getattr(module, "base_layer", module))
    assert isinstance(inner, nn.Module)
    return inner


def without_compiler(module: nn.Module) -> nn.Module:
    """Find the module inside a `torch.compile` wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def on_device(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Bring weights that accelerate has offloaded back from the meta device within the context."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    aligned: contextlib.AbstractContextManager[Any] = align_module_device(module)
    return aligned


def own_arithmetic(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compute in the precision of the tensors within the context, even if autocast is on around it."""
    stack = contextlib.ExitStack()
    for device_type in {"cpu", execution_device(module).type}:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def execution_device(module: nn.Module) -> torch.device:
    """Find the device that a layer computes on. Weights that accelerate has offloaded are on the meta device; inputs are not."""
    hook = getattr(module, "_hf_hook", None)
    tensors = (tensor.device for tensor in (*module.parameters(), *module.buffers()))
    return torch.device(getattr(hook, "execution_device", None) or next(tensors, "cpu"))


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute without PEFT's adapters within the context, whether a `PeftModel`, transformers or the user put them there.

    Merged adapters stay, because they are in the weights. PEFT's own switches would take them out, and change which weights are
    trained.
    """
    switched = [m for m in model.modules() if getattr(m, "_disable_adapters", None) is False and not getattr(m, "merged", False)]
    for module in switched:
        module._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module._disable_adapters = False  # type: ignore[assignment]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Compare two tensors of one shape: the length of their difference over that of the second."""
    theirs = theirs.float()
    return float((ours.float() - theirs).norm() / theirs.norm().clamp_min(1e-12))


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype: ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
