"""Where a causal language model keeps its last MLP projection, final norm and unembedding.

A table of families is the fast path and a structural search covers the rest. Neither is trusted: `dissect` checks
numerically, on the model at hand, that the logits are ``unembed(norm(residual))`` and that an activation moves the residual
by its neuron's write, and refuses the model otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.readout import Readout

UNITS_AT_ONCE = 1024
"""Rows of the identity that a quantised layer is asked for at a time."""
FINGERPRINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Family(NamedTuple):
    """Module paths in a `PreTrainedModel`; `down_proj` and `write_norm` are inside each layer."""

    layers: str
    down_proj: str
    final_norm: str
    write_norm: str | None = None
    """A norm on the MLP's output, before it is added to the residual."""


_LLAMA_LIKE = Family("model.layers", "mlp.down_proj", "model.norm")
_GEMMA2_LIKE = _LLAMA_LIKE._replace(write_norm="post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "cohere": _LLAMA_LIKE,
    "exaone4": _GEMMA2_LIKE,
    "falcon": Family("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "gemma": _LLAMA_LIKE,
    "gemma2": _GEMMA2_LIKE,
    "gemma3_text": _GEMMA2_LIKE,
    "glm4": _LLAMA_LIKE._replace(write_norm="post_mlp_layernorm"),
    "gpt2": Family("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neo": Family("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    "gptj": Family("transformer.h", "mlp.fc_out", "transformer.ln_f"),
    "granite": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _GEMMA2_LIKE,
    "olmo3": _GEMMA2_LIKE,
    "opt": Family("model.decoder.layers", "fc2", "model.decoder.final_layer_norm"),
    "phi": Family("model.layers", "mlp.fc2", "model.final_layernorm"),
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "starcoder2": Family("model.layers", "mlp.c_proj", "model.norm"),
}
"""Model type of the config -> where things are. Adding a family is one row here and one in ``tests/models.py``."""


class NormParameters(NamedTuple):
    """The final norm as ``gain * (h − mean(h) if centred) / sqrt(mean(h²) + epsilon) + bias``."""

    gain: Tensor
    bias: Tensor | None
    epsilon: float
    centred: bool


class LastLayerStates(NamedTuple):
    """What one forward pass left in the last layer, flattened over batch and positions."""

    activations: Tensor
    """Input of the last MLP's output projection, ``[batch · positions, n_neurons]``."""
    residual: Tensor
    """Input of the final norm, ``[batch · positions, d_model]``."""
    mlp_output: Tensor | None = None
    """Input of the write norm, ``[batch · positions, d_model]``, in a model that has one."""


@dataclass(frozen=True)
class Anatomy:
    """The modules at the end of a causal language model, and the scalars on the path between them."""

    layer: int
    """Index of the last transformer layer."""
    last_layer: nn.Module
    down_proj: nn.Module
    """Output projection of the last MLP, a ``Linear`` or a GPT-2 ``Conv1D`` (or an adapter around one)."""
    final_norm: nn.Module
    unembedding: nn.Module
    logit_scale: float
    residual_multiplier: float
    """What the MLP's output is multiplied by before it is added to the residual."""
    softcap: float | None = None
    """The logits ``y`` become ``softcap · tanh(y / softcap)``."""
    write_norm: nn.Module | None = None
    """A norm on the MLP's output, before it is added to the residual."""
    _digests: dict[Any, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def n_neurons(self) -> int:
        return _sizes(self.down_proj)[0]

    @property
    def d_model(self) -> int:
        return _sizes(self.unembedding)[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding, padding included."""
        return _sizes(self.unembedding)[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the activations."""
        return next(p.dtype for p in self.final_norm.parameters()) if self.quantised else _weight(self.unembedding).dtype

    @property
    def quantised(self) -> bool:
        """Whether the unembedding or the last projection is."""
        return not all(map(_is_plain, (self.unembedding, self.down_proj)))

    def readout(self, vocab_size: int | None = None) -> Readout:
        """The folded last layer, a float32 copy.

        Args:
            vocab_size: rows of the unembedding to keep; leave out those the tokenizer has no id for.
        """
        norm = read_norm(self.final_norm, self.d_model)
        write = None if self.write_norm is None else read_norm(self.write_norm, self.d_model)
        if write is not None and (write.centred or write.bias is not None):
            raise UnsupportedModelError(f"the norm on the MLP's output, {type(self.write_norm).__name__}, is not an RMSNorm")
        with _on_device(self.unembedding):
            unembedding = written_by(self.unembedding).T[:vocab_size]
            device, bias = unembedding.device, getattr(self.unembedding, "bias", None)
            return Readout.fold(
                w_out=self.w_out().to(device) * self.residual_multiplier,
                unembedding=unembedding,
                gain=norm.gain.to(device),
                bias=None if norm.bias is None else norm.bias.to(device),
                unembedding_bias=None if bias is None else bias[:vocab_size],
                epsilon=norm.epsilon,
                centred=norm.centred,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                write_gain=None if write is None else write.gain.to(device),
                write_epsilon=0.0 if write is None else write.epsilon,
            )

    def w_out(self) -> Tensor:
        """The last projection as ``[n_neurons, d_model]``, whatever way round and however quantised the model stores it."""
        with _on_device(_without_adapter(self.down_proj)):
            return written_by(self.down_proj).clone()

    def fingerprint(self, dtype: torch.dtype) -> str:
        """SHA-256 of the unembedding and the last projection, rounded to `dtype`; kept until the weights change."""
        key = (dtype, _stamp(self.unembedding), _stamp(self.down_proj))
        if key not in self._digests:
            self._digests[key] = self._hash_weights(dtype)
        return self._digests[key]

    def _hash_weights(self, dtype: torch.dtype) -> str:
        digest = hashlib.sha256()
        with _on_device(self.unembedding):
            for weight in (written_by(self.unembedding).T, self.w_out()):
                digest.update(str(tuple(weight.shape)).encode())
                for rows in weight.split(8192):
                    digest.update(rows.to(dtype).contiguous().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` in each of float32, bfloat16 and float16, by name.

        A checkpoint loaded in another precision has lost digits, so two loads of it agree in at least one of the three.
        """
        return {dtype_name(dtype): self.fingerprint(dtype) for dtype in FINGERPRINT_DTYPES}

    def matches(self, fingerprints: dict[str, str]) -> bool:
        """Whether these weights are those that `fingerprints` were taken of, in whatever precision either was loaded."""
        # The model's own precision first: it nearly always decides.
        for dtype in sorted(FINGERPRINT_DTYPES, key=lambda d: d != self.dtype):
            if fingerprints.get(dtype_name(dtype)) == self.fingerprint(dtype):
                return True
        return False

    @contextlib.contextmanager
    def recording(self, receive: Callable[[LastLayerStates], None]) -> Iterator[None]:
        """Within the context every forward pass hands its `LastLayerStates` to `receive`."""
        pending: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            pending[name] = args[0].detach().flatten(0, -2)

        def keep_residual(module: nn.Module, args: tuple[Any, ...]) -> None:
            if "activations" in pending:
                residual = args[0].detach().flatten(0, -2)
                receive(LastLayerStates(residual=residual, **{name: t.to(residual.device) for name, t in pending.items()}))
                pending.clear()

        with contextlib.ExitStack() as stack:
            stack.callback(self.down_proj.register_forward_pre_hook(partial(keep, "activations")).remove)
            if self.write_norm is not None:
                stack.callback(self.write_norm.register_forward_pre_hook(partial(keep, "mlp_output")).remove)
            stack.callback(self.final_norm.register_forward_pre_hook(keep_residual).remove)
            yield


_verified: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def dissect(model: nn.Module) -> Anatomy:
    """The `Anatomy` of a loaded causal language model, checked numerically (two short forward passes, once per model).

    A PEFT-wrapped model is checked without its adapters.

    Raises:
        UnsupportedModelError: with what does not fit.
    """
    anatomy = locate(model)
    base = unwrap(model)
    if _verified.get(base) != anatomy:
        verify(model, anatomy)
        _verified[base] = anatomy
    return _verified[base]


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
    layers = _last_layers(base, FAMILIES.get(config.model_type))
    last_layer = layers[-1]
    for name, module in last_layer.named_modules():
        if name.split(".")[-1] == "experts" or type(module).__name__.endswith("Experts"):
            raise UnsupportedModelError(
                f"the last layer of {config.model_type} is a mixture of experts ({name}): its neurons are active only on the "
                "tokens routed to them, which confsteer does not support"
            )
    family = FAMILIES.get(config.model_type)
    if family is not None:
        down_proj = _submodule(last_layer, family.down_proj)
        final_norm = _submodule(base, family.final_norm)
        write_norm = None if family.write_norm is None else _submodule(last_layer, family.write_norm)
    else:
        down_proj, write_norm, final_norm = _search(base, last_layer, unembedding)
    return Anatomy(
        layer=len(layers) - 1,
        last_layer=last_layer,
        down_proj=down_proj,
        final_norm=final_norm,
        unembedding=unembedding,
        logit_scale=getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0),
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        write_norm=write_norm,
    )


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT or `torch.compile` wrapper, or the model itself.

    Raises:
        UnsupportedModelError: there is none.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model")
    return inner


def input_device(base: PreTrainedModel) -> torch.device:
    """Where token ids go; weights that accelerate has offloaded are on the meta device, their inputs are not."""
    hook = getattr(base.get_input_embeddings(), "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or base.device)


def _submodule(parent: nn.Module, path: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(parent).__name__} has no {path}") from error


def _last_layers(base: PreTrainedModel, family: Family | None) -> nn.ModuleList:
    """The stack of transformer layers: by the table, or the longest list of modules."""
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
    """The last projection, the norm on its output and the final norm of a model not in the table, by the order of calls.

    The final norm is the last module before the unembedding that is callable on the residual as a norm; the projection
    is the last ``Linear`` of the last layer that maps a wider space to ``d_model``. A norm of the layer that is called
    after the projection stands between it and the residual.
    """
    d_model, vocab_size = _sizes(unembedding)
    calls: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(module)

    with contextlib.ExitStack() as stack:
        for module in base.modules():
            if next(module.children(), None) is None or isinstance(module, Conv1D | nn.Linear):
                stack.callback(module.register_forward_hook(note).remove)
        _forward(base, _probe_ids(vocab_size))
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
    return projections[-1], write_norm, norms[-1]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _maps_to(module: nn.Module, d_model: int) -> bool:
    return isinstance(module, Conv1D | nn.Linear) and _sizes(module)[1] == d_model < _sizes(module)[0]


def read_norm(norm: nn.Module, d_model: int) -> NormParameters:
    """Kind, gain, bias and epsilon of a norm, decided by what it computes rather than by what it is called.

    LayerNorm and RMSNorm, with gain ``weight``, ``1 + weight`` (Gemma) or none, are tried against the module itself.

    Raises:
        UnsupportedModelError: it computes none of these.
    """
    with _on_device(norm), torch.no_grad():
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        like = weight if weight is not None else torch.ones(d_model)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(4, d_model, generator=generator) + 0.5
        # The small rows make epsilon count; float16 would underflow their squares in some implementations.
        probe[2:] *= 1e-2
        probe = probe.to(like.device, like.dtype)
        answer = norm(probe)
        # Norms of vLLM that also add the residual give it back beside.
        expected = (answer[0] if isinstance(answer, tuple) else answer).float()
        epsilon = next((float(getattr(norm, n)) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-5)
        gains = [torch.ones(d_model, device=like.device)] if weight is None else [weight.float(), 1 + weight.float()]
        tolerance = 1e-4 if like.dtype == torch.float32 else 2e-2
        for centred in (True, False):
            x = probe.float()
            x = x - x.mean(dim=-1, keepdim=True) if centred else x
            x = x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
            for gain in gains:
                ours = x * gain + (0 if bias is None else bias.float())
                if float((ours - expected).norm()) <= tolerance * float(expected.norm()):
                    return NormParameters(gain.clone(), None if bias is None else bias.float().clone(), epsilon, centred)
    raise UnsupportedModelError(f"the final norm {type(norm).__name__} is neither a LayerNorm nor an RMSNorm")


def verify(model: nn.Module, anatomy: Anatomy) -> None:
    """Check on the model at hand that its last layer is what `anatomy` says.

    Raises:
        UnsupportedModelError: logits are not ``unembed(norm(residual))``, or an activation does not move the residual by
            its neuron's write.
    """
    base = unwrap(model)
    name = base.config.model_type
    tolerance = 1e-3 if anatomy.dtype == torch.float32 else 5e-2
    ids = _probe_ids(anatomy.vocab_size)
    states: list[LastLayerStates] = []
    # PEFT's own switch where the model has one; elsewhere there is nothing to switch off.
    without_adapters = getattr(model, "disable_adapter", contextlib.nullcontext)
    with without_adapters(), anatomy.recording(states.append):
        logits = _forward(base, ids)
        if len(states) != 1:
            raise UnsupportedModelError(
                f"{name}: the last MLP projection and the final norm should run once, in this order, in a forward pass; "
                f"they ran {len(states)} times"
            )
        before = states.pop()
        readout = anatomy.readout()
        device = readout.w_out.device
        mlp_output = None if before.mlp_output is None else before.mlp_output.to(device)
        state = readout.state(before.residual.to(device), mlp_output)
        neurons = torch.linspace(0, anatomy.n_neurons - 1, steps=min(4, anatomy.n_neurons)).long()
        chosen = torch.zeros(1, anatomy.n_neurons, device=device)
        chosen[:, neurons] = 1
        # A push as large as what it is added to, so that rounding in half precision stays small beside it.
        write, onto = readout.w_out, state.residual
        if readout.write_norm is not None and state.mlp_output is not None:
            write, onto = readout.write_norm.inputs, state.mlp_output
        push = float(onto.norm(dim=-1).mean() / (chosen @ write).norm().clamp_min(1e-12))

        def push_activations(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            pushed = args[0].clone()
            pushed[..., neurons.to(pushed.device)] += push
            return (pushed, *args[1:])

        handle = anatomy.down_proj.register_forward_pre_hook(push_activations, prepend=True)
        try:
            _forward(base, ids)
        finally:
            handle.remove()
        after = states.pop()
    if not torch.isfinite(logits).all():
        raise UnsupportedModelError(f"{name}: the model's logits are not finite; its weights may be damaged")
    ours, theirs = readout.logits(state.residual), logits.flatten(0, -2).float().to(device)
    error = _relative_error(ours - ours.mean(dim=-1, keepdim=True), theirs - theirs.mean(dim=-1, keepdim=True))
    if not error < tolerance:
        raise UnsupportedModelError(
            f"{name}: its logits are not its unembedding applied to its final norm (relative error {error:.1e}, at most "
            f"{tolerance:.0e}); something else happens to them"
        )
    moved = readout.centre(after.residual.to(device)) - state.residual
    error = _relative_error(moved, readout.residual_after(state, push * chosen) - state.residual)
    if not error < tolerance:
        raise UnsupportedModelError(
            f"{name}: a neuron of the last MLP does not move the residual by its output weights (relative error {error:.1e}, "
            f"at most {tolerance:.0e}); something else happens to the MLP's output before it is added"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def _probe_ids(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))


def _forward(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[batch, positions, vocab]`` in evaluation mode; every module's mode is put back.

    The mask says what models otherwise look for in the ids, which have no values on the meta device.
    """
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        with torch.no_grad():
            ids = ids.to(input_device(base))
            logits: Tensor = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits
    finally:
        for module, mode in modes:
            module.training = mode


def written_by(projection: nn.Module) -> Tensor:
    """What a unit of each input adds to the output of a linear layer, ``[inputs, outputs]``.

    Quantised weights come in many layouts. All of them can be asked: the layer's answer to each unit input, less its answer
    to none, is the row as the model itself uses it.
    """
    projection = _without_adapter(projection)
    if _is_plain(projection):
        weight = _weight(projection).detach()
        return weight if isinstance(projection, Conv1D) else weight.T
    inputs, _ = _sizes(projection)
    like = next((t for t in (*projection.parameters(), *projection.buffers()) if t.is_floating_point()), torch.ones(()))
    with torch.no_grad():
        nothing = projection(torch.zeros(1, inputs, device=like.device, dtype=like.dtype))
        units = torch.eye(inputs, device=like.device, dtype=like.dtype).split(UNITS_AT_ONCE)
        return torch.cat([projection(rows) - nothing for rows in units])


def _is_plain(module: nn.Module) -> bool:
    """Whether its weight is an ordinary matrix."""
    weight = getattr(_without_adapter(module), "weight", None)
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    module = _without_adapter(module)
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    raise UnsupportedModelError(f"{type(module).__name__} is not a linear layer that says its sizes")


def _stamp(module: nn.Module) -> tuple[Any, ...]:
    """Changes when the weights of a layer do."""
    module = _without_adapter(module)
    tensors = (*module.parameters(), *module.buffers())
    return tuple((id(t), None if t.is_inference() else t._version) for t in tensors)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _without_adapter(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT adapter layer, or the layer itself."""
    inner = getattr(module, "base_layer", module)
    assert isinstance(inner, nn.Module)
    return inner


def _on_device(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Weights that accelerate has offloaded are on the meta device; this brings them back for the time of the context."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    aligned: contextlib.AbstractContextManager[Any] = align_module_device(module)
    return aligned
