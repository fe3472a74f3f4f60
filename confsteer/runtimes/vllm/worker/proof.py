"""The numerical proof that a model is steered, from the output of its final norm. Pure functions of tensors.

The output is ``y = γ ⊙ x/σ + β`` for a residual ``x``, centred first if the norm is a LayerNorm. Neither ``x`` nor ``σ`` can be
seen from outside a compiled graph. But some neurons can be pushed so that they write ``w`` more. The new residual is then
``x + w``, so ``γ ⊙ w`` lies in the plane of the two outputs without their bias. With a norm of gain ``g`` on the MLP's output
``m``, the residual moves in the span of ``g ⊙ m`` and ``g ⊙ w``. Then ``γ ⊙ g ⊙ w`` lies in the span of three outputs: not
pushed, and pushed by two different amounts. An unrelated vector lies in neither span.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.readout import NormParameters

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest relative error that rounding explains, in each precision."""


PUSHES = {torch.float32: (4.0, 64.0, 1024.0), torch.bfloat16: (4.0, 64.0, 1024.0), torch.float16: (4.0, 16.0, 64.0)}
"""Pushes of the neurons, in their standard deviations.

The first is about as large as an ordinary residual. The last can be seen beside any. In float16 larger ones overflow."""


class ProofOutputs(NamedTuple):
    """Outputs of the final norm, ``[tokens, d_model]`` each, for the same inputs under different steerings."""

    neutral: Tensor
    again: Tensor
    """Neutral steering once more."""
    pushed: tuple[Tensor, ...]
    """Every neuron pushed, by different amounts along the same write."""
    mixed: Tensor
    """Every other token, from the second on, pushed as in the last of `pushed`. The others are neutral."""
    replaced: Tensor
    """Activations set by gain 0 and a bias."""
    clamped: Tensor
    """Activations set to the same by their bounds."""


def prove(outputs: ProofOutputs, write: Tensor, norm: NormParameters, write_gain: Tensor | None, dtype: torch.dtype) -> float:
    """Check the outputs. Return the share of the pushed neurons' write that they leave unexplained.

    Args:
        outputs: outputs of the proof's steps.
        write: additional write of the pushed neurons, up to a factor, ``[d_model]``.
        norm: the final norm.
        write_gain: gain of the norm on the MLP's output, if there is one, ``[d_model]``.
        dtype: the model's precision.

    Raises:
        UnsupportedModelError: the outputs are not those of a steered model. The message says what is wrong with them.
    """
    tolerance = TOLERANCE[dtype]
    pushed = outputs.pushed[-1]
    facts = {
        "the same input gives different outputs": _agree(outputs.again, outputs.neutral, tolerance),
        "pushing the neurons changes nothing": not _agree(pushed, outputs.neutral, tolerance),
        "a token is not steered as its request": _agree(outputs.mixed[1::2], pushed[1::2], tolerance),
        "a token is steered as another request": _agree(outputs.mixed[::2], outputs.neutral[::2], tolerance),
        "gain and bounds do not agree": _agree(outputs.clamped, outputs.replaced, tolerance),
    }
    for failure, holds in facts.items():
        if not holds:
            raise UnsupportedModelError(f"steering was tried before serving and does not work here: {failure}")
    left = unexplained(write, torch.stack([outputs.neutral, *outputs.pushed]), norm, write_gain)
    if not left <= tolerance:
        raise UnsupportedModelError(
            "steering was tried before serving and does not work here: pushing the neurons does not move the residual by their "
            f"output weights (relative error {left:.1e}, at most {tolerance:.0e})"
        )
    return left


@torch.no_grad()
def unexplained(write: Tensor, outputs: Tensor, norm: NormParameters, write_gain: Tensor | None) -> float:
    """Compute the share of `write` that is outside the span of the outputs, the median over tokens.

    Args:
        write: ``[d_model]``.
        outputs: ``[pushes, tokens, d_model]``, one of them not pushed.
        norm: the final norm.
        write_gain: see `prove`.
    """
    write = write if write_gain is None else write * write_gain
    write = write - write.mean() if norm.centred else write
    target = (write * norm.gain).double()
    seen = outputs.double() if norm.bias is None else outputs.double() - norm.bias.double()
    # Allow for zeros: later ranks of a pipeline are fed zeros, and a model without biases answers with zeros.
    unit = seen / seen.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    span, _ = torch.linalg.qr(unit.permute(1, 2, 0))  # [tokens, d_model, pushes]
    left = target - (span @ (span.transpose(1, 2) @ target)[..., None])[..., 0]
    return float((left.norm(dim=-1) / target.norm()).median())


def _agree(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
