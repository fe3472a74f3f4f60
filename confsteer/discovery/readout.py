"""The path from the last MLP's activations to the logits, as a few tensors.

After the last MLP's output projection a transformer has only ``residual add -> final norm -> unembedding`` left. All of
confsteer's mathematics happens on this path, in closed form, without a model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_PER_CHUNK = 8192
"""Rows of a weight matrix converted to float64 at a time."""


@dataclass(frozen=True)
class Readout:
    """The last layer of a language model, folded so that every norm and bias on the path is explicit.

    With ``x = residual / norm_scale(residual)`` the logits are ``unembedding @ x + logit_bias``.

    The norm's gain and the logit scale are folded into `unembedding`. For a LayerNorm, which subtracts the mean of its
    input, `w_out` and the rows of `unembedding` are centred over ``d_model`` and every residual is centred by the
    methods below, so that LayerNorm and RMSNorm follow the same formulas. `unembedding` and `logit_bias` are also
    centred over the vocabulary: that adds a constant to all logits of a token, which no probability notices.
    """

    w_out: Tensor
    """What each neuron of the last MLP adds to the residual per unit of activation, ``[n_neurons, d_model]``."""
    unembedding: Tensor
    """Folded unembedding ``W_U``, ``[vocab, d_model]``."""
    logit_bias: Tensor
    """Added to the logits, ``[vocab]``; zeros where the model has none."""
    epsilon: float
    """The final norm's epsilon."""
    centred: bool
    """Whether the final norm subtracts the mean (LayerNorm) or not (RMSNorm)."""

    @property
    def n_neurons(self) -> int:
        return self.w_out.shape[0]

    @property
    def d_model(self) -> int:
        return self.w_out.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.unembedding.shape[0]

    @classmethod
    def fold(
        cls,
        *,
        w_out: Tensor,
        unembedding: Tensor,
        gain: Tensor,
        bias: Tensor | None = None,
        unembedding_bias: Tensor | None = None,
        epsilon: float,
        centred: bool,
        logit_scale: float = 1.0,
    ) -> Readout:
        """Build from a model's raw weights, in float32.

        Args:
            w_out: ``[n_neurons, d_model]``, any residual multiplier already applied.
            unembedding: raw ``[vocab, d_model]``.
            gain: the final norm's effective gain ``[d_model]`` (ones where it has none).
            bias: the final norm's bias ``[d_model]``.
            unembedding_bias: the unembedding's own bias ``[vocab]``.
            epsilon: the final norm's epsilon.
            centred: whether the final norm is a LayerNorm.
            logit_scale: what the raw logits are multiplied by.
        """
        w_out = w_out.detach().float()
        raw = unembedding.detach().float()
        folded = raw * (gain.detach().float() * logit_scale)
        logit_bias = torch.zeros(raw.shape[0], device=raw.device)
        if bias is not None:
            logit_bias += raw @ bias.detach().float() * logit_scale
        if unembedding_bias is not None:
            logit_bias += unembedding_bias.detach().float() * logit_scale
        if centred:
            w_out = w_out - w_out.mean(dim=1, keepdim=True)
            folded -= folded.mean(dim=1, keepdim=True)
        folded -= folded.mean(dim=0)
        logit_bias -= logit_bias.mean()
        return cls(w_out, folded, logit_bias, epsilon, centred)

    @functools.cached_property
    def gram(self) -> Tensor:
        """``W_Uᵀ W_U`` in float64, ``[d_model, d_model]``: lengths of writes in logit space, and the unembedding's spectrum."""
        gram = torch.zeros(self.d_model, self.d_model, dtype=torch.float64, device=self.unembedding.device)
        for rows in self.unembedding.split(ROWS_PER_CHUNK):
            rows = rows.double()
            gram.addmm_(rows.T, rows)
        return gram

    def centre(self, residual: Tensor) -> Tensor:
        """The part of `residual` ``[..., d_model]`` that the final norm sees, float32."""
        residual = residual.float()
        return residual - residual.mean(dim=-1, keepdim=True) if self.centred else residual

    def norm_scale(self, residual: Tensor) -> Tensor:
        """``sqrt(mean(h²) + ε)`` of a centred residual ``[..., d_model]``: the final norm's denominator, ``[...]``."""
        return (residual.square().mean(dim=-1) + self.epsilon).sqrt()

    def logits(self, residual: Tensor) -> Tensor:
        """Logits ``[..., vocab]`` of a residual ``[..., d_model]``, up to a constant per token."""
        residual = self.centre(residual)
        return (residual / self.norm_scale(residual)[..., None]) @ self.unembedding.T + self.logit_bias
