"""Factors between a last MLP and the logits, by their names in each family's config or module."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn


class Factors(NamedTuple):
    """Scalars on the path from the last MLP to the logits."""

    logit_scale: float
    residual_multiplier: float
    """Factor of the MLP's output as it is added to the residual."""
    softcap: float | None
    """The logits ``y`` become ``softcap · tanh(y / softcap)``."""


def read_factors(model: nn.Module, config: Any, last_layer: nn.Module) -> Factors:
    """Read the factors of a model. `dissect` proves them.

    Args:
        model: the model with the unembedding.
        config: config of its language model.
        last_layer: the last layer, which may have a factor among its weights. A factor that was not read is NaN.
    """
    return Factors(_logit_scale(model, config), residual_multiplier(config, last_layer), _softcap(config))


def _logit_scale(model: nn.Module, config: Any) -> float:
    # Read Cohere's. Its multimodal classes have no such attribute, and leave the logits as they are.
    scale = float(getattr(model, "logit_scale", None) or 1.0)
    for name in ("lm_head_multiplier", "output_multiplier"):  # Falcon-H1, Muse Glimmer
        scale *= getattr(config, name, 1.0)
    scaling = getattr(config, "logits_scaling", 1.0)
    # Look at the family: Granite and MiniCPM3 divide, but HyperCLOVA X multiplies by a number of the same name.
    return scale * scaling if config.model_type == "hyperclovax" else scale / scaling


def residual_multiplier(config: Any, last_layer: nn.Module) -> float:
    """Read the factor on the MLP's output; see `read_factors`."""
    multiplier = float(getattr(config, "residual_multiplier", 1.0))  # Granite
    if hasattr(config, "scale_depth"):  # MiniCPM3
        multiplier *= config.scale_depth / math.sqrt(config.num_hidden_layers)
    if hasattr(config, "mlp_multipliers"):  # Falcon-H1
        multiplier *= config.mlp_multipliers[-1]
    scalar = getattr(last_layer, "layer_scalar", None)  # Gemma 4
    if scalar is None:
        return multiplier
    return multiplier * (math.nan if scalar.is_meta else float(scalar))


def _softcap(config: Any) -> float | None:
    # Gemma 2, RecurrentGemma, xLSTM
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((value for name in names if (value := getattr(config, name, None))), None)
