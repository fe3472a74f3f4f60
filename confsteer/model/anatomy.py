"""The modules at the end of a causal language model, and the scalars on the path between them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from confsteer.errors import UnsupportedModelError
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
        """Whether the unembedding or the last projection is."""
        return not all(map(is_plain, (self.unembedding, self.down_proj)))

    def readout(self, vocab_size: int | None = None) -> Readout:
        """The folded last layer, a float32 copy.

        Args:
            vocab_size: rows of the unembedding to keep; leave out those the tokenizer has no id for.
        """
        norm = read_norm(self.final_norm, self.d_model)
        write = None if self.write_norm is None else read_norm(self.write_norm, self.d_model)
        if write is not None and (write.centred or write.bias is not None):
            raise UnsupportedModelError(f"the norm on the MLP's output, {type(self.write_norm).__name__}, is not an RMSNorm")
        with on_device(self.unembedding):
            unembedding = output_weights(self.unembedding).T[:vocab_size]
            device, bias = unembedding.device, getattr(self.unembedding, "bias", None)
            return Readout.fold(
                w_out=self.w_out().to(device) * self.residual_multiplier,
                unembedding=unembedding,
                norm=norm.to(device),
                unembedding_bias=None if bias is None else bias[:vocab_size],
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                write_norm=None if write is None else write.to(device),
            )

    def w_out(self) -> Tensor:
        """The last projection as ``[n_neurons, d_model]``, whatever way round and however quantised the model stores it."""
        with on_device(without_adapter(self.down_proj)):
            return output_weights(self.down_proj).clone()

    def fingerprint(self, dtype: torch.dtype) -> str:
        """SHA-256 of the unembedding and the last projection, rounded to `dtype`; kept until the weights change."""
        key = (dtype, weights_version(self.unembedding), weights_version(self.down_proj))
        if key not in self._digests:
            self._digests[key] = self._hash_weights(dtype)
        return self._digests[key]

    def _hash_weights(self, dtype: torch.dtype) -> str:
        digest = hashlib.sha256()
        with on_device(self.unembedding):
            for weight in (output_weights(self.unembedding).T, self.w_out()):
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
