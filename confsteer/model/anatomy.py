"""The modules at the end of a causal language model, and the scalars on the path between them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.experts import Experts
from confsteer.last_layer.readout import Readout
from confsteer.model.layers import (
    dtype_name,
    is_plain,
    on_device,
    output_weights,
    read_norm,
    sizes,
    weight_of,
    weights_version,
    without_adapter,
)

FINGERPRINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_ROWS = 64
"""Rows of a weight, evenly spread, that are compared number by number to notice a change."""


class LastLayerStates(NamedTuple):
    """States that one forward pass left in the last layer, flattened over batch and positions."""

    activations: Tensor
    """Input of the last MLP's output projection, ``[batch · positions, n_neurons]``."""
    residual: Tensor
    """Input of the final norm, ``[batch · positions, d_model]``."""
    mlp_output: Tensor | None = None
    """Input of the write norm, ``[batch · positions, d_model]``, in a model that has one."""
    experts: Tensor | None = None
    """Experts that each token is routed to, in a mixture of experts. For its activations see `TokenStates`."""


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
    """Factor of the MLP's output, or of the output of its norm, as it is added to the residual."""
    softcap: float | None = None
    """The logits ``y`` become ``softcap · tanh(y / softcap)``."""
    write_norm: nn.Module | None = None
    """A norm on the MLP's output, before it is added to the residual."""
    _digests: dict[Any, str] = field(default_factory=dict, compare=False, repr=False)
    _folded: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Content of the weights when `readout` last read them."""

    @property
    def experts(self) -> Experts | None:
        """Sizes of a mixture of experts; None if the last MLP is a dense one."""
        return None

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """Modules that hold the neurons' output weights."""
        return (self.down_proj,)

    @property
    def linear_projections(self) -> tuple[nn.Module, ...]:
        """Those `projections` that are linear layers. Their input is the activations."""
        return self.projections

    @property
    def n_neurons(self) -> int:
        return sizes(self.down_proj)[0]

    @property
    def d_model(self) -> int:
        return sizes(self.unembedding)[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding, padding included."""
        return sizes(self.unembedding)[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the activations."""
        return next(p.dtype for p in self.final_norm.parameters()) if self.quantised else weight_of(self.unembedding).dtype

    @property
    def quantised(self) -> bool:
        """Whether the unembedding or the last projection is quantised."""
        return not all(map(is_plain, (self.unembedding, self.down_proj)))

    def readout(self, vocab_size: int | None = None, neurons: Tensor | None = None) -> Readout:
        """Fold the last layer, as a float32 copy.

        Args:
            vocab_size: number of rows of the unembedding to keep, so that those without an id in the tokenizer are left out.
            neurons: indices ``[n]`` of the neurons to keep; all if None.

        Raises:
            UnsupportedModelError: this process has only parts of the weights, or a norm is of an unknown kind.
        """
        self._require_whole_weights()
        self._folded["content"] = self._content()
        norm = read_norm(self.final_norm, self.d_model)
        write, multiplier = None, self.residual_multiplier
        if self.write_norm is not None:
            write = read_norm(self.write_norm, self.d_model)
            if write.centred or write.bias is not None:
                raise UnsupportedModelError(f"the norm on the MLP's output, {type(self.write_norm).__name__}, is not an RMSNorm")
            write, multiplier = write._replace(gain=write.gain * multiplier), 1.0
        with on_device(self.unembedding):
            unembedding = output_weights(self.unembedding).T[:vocab_size]
            device, bias = unembedding.device, getattr(self.unembedding, "bias", None)
            return Readout.fold(
                w_out=self.w_out(neurons).to(device) * multiplier,
                unembedding=unembedding,
                norm=norm.to(device),
                unembedding_bias=None if bias is None else bias[:vocab_size],
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                write_norm=None if write is None else write.to(device),
            )

    def w_out(self, neurons: Tensor | None = None) -> Tensor:
        """Read the last projection as ``[n_neurons, d_model]``, even if the model stores it transposed or quantised.

        Args:
            neurons: indices ``[n]`` of the rows to read; all if None.
        """
        with on_device(without_adapter(self.down_proj)):
            rows = output_weights(self.down_proj)
            return rows.clone() if neurons is None else rows[neurons.to(rows.device)]

    def writes(self) -> Iterator[Tensor]:
        """Yield the rows of `w_out`, in parts as the model stores them."""
        yield self.w_out()

    def scaled_writes(self) -> Iterator[Tensor]:
        """Yield `writes` times the factor on the MLP's output, as `Readout.fold` takes them."""
        return (rows * self.residual_multiplier for rows in self.writes())

    def fingerprint(self, dtype: torch.dtype) -> str:
        """Hash the unembedding and the last projection, rounded to `dtype`, by SHA-256. The hash is kept until they change."""
        layers = (self.unembedding, *self.projections)
        key = (dtype, *(weights_content(layer) or weights_version(layer) for layer in layers))
        if key not in self._digests:
            self._require_whole_weights()
            self._digests[key] = self._hash_weights(dtype)
        return self._digests[key]

    def _hash_weights(self, dtype: torch.dtype) -> str:
        digest = hashlib.sha256()
        with on_device(self.unembedding):
            for weight in chain([output_weights(self.unembedding).T], self.writes()):
                digest.update(str(tuple(weight.shape)).encode())
                for rows in weight.split(8192):
                    digest.update(rows.to(dtype).contiguous().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` in each of float32, bfloat16 and float16, by name.

        A checkpoint loaded in another precision has lost digits. Two loads of it still agree in at least one of the three.
        """
        return {dtype_name(dtype): self.fingerprint(dtype) for dtype in FINGERPRINT_DTYPES}

    def matches(self, fingerprints: dict[str, str]) -> bool:
        """Whether `fingerprints` are of these weights, whatever the precision that each was loaded in."""
        # Try the model's own precision first: it nearly always decides.
        for dtype in sorted(FINGERPRINT_DTYPES, key=lambda d: d != self.dtype):
            if fingerprints.get(dtype_name(dtype)) == self.fingerprint(dtype):
                return True
        return False

    @property
    def changed_since_readout(self) -> bool:
        """Whether the weights have changed since `readout` last folded them."""
        return "content" in self._folded and self._folded["content"] != self._content()

    def _content(self) -> tuple[Any, ...]:
        norms = [norm for norm in (self.final_norm, self.write_norm) if norm is not None]
        return tuple(weights_content(module) for module in (self.unembedding, *self.projections, *norms))

    def _require_whole_weights(self) -> None:
        """
        Raises:
            UnsupportedModelError: other processes have parts of them.
        """
        for module in (self.unembedding, *self.projections, self.final_norm):
            for parameter in module.parameters():
                # Refuse shards: an index in one would not say which neuron it is, for measuring or for steering. DeepSpeed
                # leaves an empty tensor where a partitioned one was.
                if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
                    raise UnsupportedModelError(
                        "the weights are split over processes (tensor parallel, FSDP or ZeRO-3): each has a part of the "
                        'last layer. Load the model whole in every process: without tp_plan; device_map="auto" spreads it over '
                        "the devices of one"
                    )

    def require_dense(self, what: str) -> None:
        """Refuse a mixture of experts, for a use that needs neurons that are active on all tokens.

        Raises:
            UnsupportedModelError: the last layer is a mixture of experts.
        """
        if self.experts is not None:
            raise UnsupportedModelError(
                f"{what} needs neurons that are active on every token; the last layer of this model is a mixture of experts "
                f"({self.experts})"
            )

    @contextlib.contextmanager
    def recording(self, receive: Callable[[LastLayerStates], None]) -> Iterator[None]:
        """Hand the `LastLayerStates` of every forward pass within the context to `receive`."""
        pending: dict[str, Tensor] = {}

        def keep_residual(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (states := self._gather(pending, args[0].detach().flatten(0, -2))) is not None:
                receive(states)
                pending.clear()

        with contextlib.ExitStack() as stack:
            self._note(pending, stack)
            if self.write_norm is not None:
                stack.callback(self.write_norm.register_forward_pre_hook(_keep("mlp_output", pending)).remove)
            stack.callback(self.final_norm.register_forward_pre_hook(keep_residual).remove)
            yield

    def _note(self, pending: dict[str, Tensor], stack: contextlib.ExitStack) -> None:
        """Put the activations of every pass into `pending` until `stack` is closed."""
        stack.callback(self.down_proj.register_forward_pre_hook(_keep("activations", pending)).remove)

    def _gather(self, pending: dict[str, Tensor], residual: Tensor) -> LastLayerStates | None:
        """Join the states that a pass has left; None if it did not run the last layer."""
        if "activations" not in pending:
            return None
        return LastLayerStates(residual=residual, **{name: t.to(residual.device) for name, t in pending.items()})


def _keep(name: str, pending: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Make a hook that keeps a module's input, flattened over batch and positions."""

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        pending[name] = args[0].detach().flatten(0, -2)

    return keep


def weights_content(module: nn.Module) -> tuple[Any, ...] | None:
    """Summarise the weights of a layer, so that any change of them shows, however it was made.

    PyTorch's own version counter does not see writes through ``.data``, NumPy views or other processes. The sums of all rows do.
    They take as long as one product of the weights with a vector. A permutation of columns, as in merging models, leaves the
    sums alone, but changes the few rows that are kept whole.

    Returns:
        None for quantised or offloaded weights, which cost too much to read. confsteer assumes that nobody writes into them
        through ``.data``.
    """
    tensors = (*without_adapter(module).parameters(), *without_adapter(module).buffers())
    if not all(type(tensor.data) is Tensor and tensor.is_floating_point() and not tensor.is_meta for tensor in tensors):
        return None
    return tuple(_summary(tensor.detach()) for tensor in tensors)


def _summary(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (tuple(tensor.shape),)
    rows = (tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(1, -1)).contiguous()
    # Add integers, which do not round. Eight bytes at a time are ten times faster than fewer.
    units = next(
        unit
        for unit in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if rows.shape[1] * rows.element_size() % unit.itemsize == 0 and rows.data_ptr() % unit.itemsize == 0
    )
    whole = rows[:: max(1, len(rows) // WHOLE_ROWS)]
    digest = hashlib.sha256()
    for part in (rows.view(units).sum(dim=1, dtype=torch.int64), whole.contiguous()):
        digest.update(part.view(torch.uint8).cpu().numpy().tobytes())
    return (tuple(tensor.shape), dtype_name(tensor.dtype), digest.digest())
