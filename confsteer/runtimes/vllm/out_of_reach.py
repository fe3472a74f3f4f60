"""Mixtures whose experts cannot be steered inside vLLM, and the way out."""

from __future__ import annotations

import contextlib
from typing import Any

from packaging.version import Version

from confsteer.errors import NoNeuronsError, SteeringError, UnsupportedModelError
from confsteer.profile.profile import Profile

OLDEST_WITH_EXPERTS = "0.32"
"""First release of vLLM whose experts are steered."""


def out_of_reach(profile: Profile, config: Any, version: str) -> str | None:
    """Find in an engine's configuration a reason why the profile's neurons of experts cannot be steered. None if it has none.

    `confsteer.runtimes.vllm.worker.experts.find_experts` looks for reasons in the loaded model.

    Args:
        profile: to steer with.
        config: the engine's ``VllmConfig``.
        version: version of vLLM.
    """
    if profile.model.experts is None or not profile.steerable:
        return None
    model, parallel = config.model_config, config.parallel_config
    reasons = {
        f"this is vLLM {version}, and they are from {OLDEST_WITH_EXPERTS} on": Version(version) < Version(OLDEST_WITH_EXPERTS),
        f"they are quantised there ({model.quantization})": model.quantization is not None,
        "of LoRA adapters (--enable-lora)": config.lora_config is not None,
        "each rank holds whole experts (--enable-expert-parallel, --enable-eplb)": parallel.enable_expert_parallel
        or parallel.enable_eplb,
        "ranks share experts and not tokens (--data-parallel-size)": parallel.data_parallel_size > 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def experts_out_of_reach(profile: Profile, reason: str) -> UnsupportedModelError:
    """Make the error for a mixture whose experts cannot be steered.

    Args:
        profile: profile of a mixture of experts.
        reason: why, in words that follow "because".
    """
    return UnsupportedModelError(
        f"the experts of {profile.model.id} cannot be steered in vLLM, because {reason}. An entropy dial that needs none of them "
        "works there: confsteer calibrate MODEL --null-direction. Or steer in transformers (confsteer.steer, confsteer generate)"
    )


def direction_alone(profile: Profile) -> Profile:
    """Reduce a profile to its null direction, with the dial and the presets that need no neurons."""
    dials = {"entropy": profile.response["entropy"]}
    texts = {text: {"entropy": curves["entropy"]} for text, curves in profile.responses_by_text.items()}
    none: dict[str, Any] = {"entropy_neurons": (), "frequency_neurons": (), "response": dials, "responses_by_text": texts}
    alone = profile.model_copy(update=none | {"presets": {}})
    presets = {}
    for name, steering in profile.presets.items():
        with contextlib.suppress(SteeringError, NoNeuronsError):
            alone.edit(steering)
            presets[name] = steering
    return alone.model_copy(update={"presets": presets})
