"""Mixtures whose experts cannot be steered in vLLM, and what is left of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import confsteer
from confsteer import NoNeuronsError, Profile, Steering, SteeringError
from confsteer.runtimes.vllm.edit import edit_of
from confsteer.runtimes.vllm.out_of_reach import OLDEST_WITH_EXPERTS, direction_alone, experts_out_of_reach, out_of_reach
from confsteer.runtimes.vllm.settings import Settings
from tests.mixtures import planted_experts
from tests.planted import planted


def config(**changed: Any) -> Any:
    """As much of a `VllmConfig` as is looked at."""
    parallel = SimpleNamespace(enable_expert_parallel=False, enable_eplb=False, data_parallel_size=1)
    for name, value in changed.items():
        if hasattr(parallel, name):
            setattr(parallel, name, value)
    model = SimpleNamespace(quantization=changed.get("quantization"))
    return SimpleNamespace(model_config=model, parallel_config=parallel, lora_config=changed.get("lora_config"))


@pytest.fixture(scope="module")
def with_direction() -> Profile:
    """A profile of a mixture with a token-frequency neuron, an entropy dial made by hand, and presets that need either."""
    model, tokenizer, texts, _ = planted_experts("mixtral")
    profile = confsteer.calibrate(model, tokenizer, texts, window=64, source="zipf", null_direction=True)
    assert profile.steerable
    return profile.with_preset("calm", Steering(entropy=0.2)).with_preset("rare", Steering(unigram=-0.1))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"quantization": "fp8"}, r"quantised there \(fp8\)"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
    ],
)
def test_what_keeps_experts_out_of_reach_is_said_with_the_way_out(changed: dict[str, Any], why: str) -> None:
    profile = planted_experts("mixtral").profile
    assert out_of_reach(profile, config(), OLDEST_WITH_EXPERTS) is None
    reason = out_of_reach(profile, config(**changed), OLDEST_WITH_EXPERTS)
    assert reason is not None
    with pytest.raises(confsteer.UnsupportedModelError, match=f"because .*{why}.*confsteer calibrate MODEL --null-direction"):
        raise experts_out_of_reach(profile, reason)
    assert out_of_reach(planted("llama").profile, config(**changed), OLDEST_WITH_EXPERTS) is None


def test_releases_before_are_named() -> None:
    assert "vLLM 0.31.0" in (out_of_reach(planted_experts("mixtral").profile, config(), "0.31.0") or "")


def test_a_direction_alone_is_what_it_is_beside_neurons(with_direction: Profile) -> None:
    alone = direction_alone(with_direction)
    Profile.model_validate_json(alone.model_dump_json())
    assert (alone.steerable, list(alone.response), list(alone.presets)) == ((), ["entropy"], ["calm"])
    assert out_of_reach(alone, config(quantization="fp8"), OLDEST_WITH_EXPERTS) is None
    steering = Steering(entropy=0.3)
    assert alone.null_write(steering) == with_direction.null_write(steering) > 0
    gain, bias, low, high = edit_of(alone, steering)[:, -1]
    assert (gain, low, high) == (1, float("-inf"), float("inf"))
    assert bias == pytest.approx(alone.null_write(steering))
    assert (edit_of(with_direction, steering)[:, -1] == edit_of(alone, steering)[:, -1]).all()
    with pytest.raises(NoNeuronsError, match="no token-frequency neurons"):
        edit_of(alone, Steering(unigram=0.1))
    with pytest.raises(SteeringError, match="not in the profile"):
        edit_of(alone, Steering(scale={with_direction.steerable[0].key: 0.0}))


def test_settings_say_whether_it_is_alone(with_direction: Profile, tmp_path: Path) -> None:
    with_direction.save(tmp_path)
    settings = Settings(profile=str(tmp_path), checksum=with_direction.checksum)
    assert settings.load_profile() == with_direction
    assert settings.model_copy(update={"direction_alone": True}).load_profile() == direction_alone(with_direction)
