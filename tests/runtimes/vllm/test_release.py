from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from confsteer import UnsupportedServerError
from confsteer.runtimes.vllm.release import check_features, check_release


@pytest.mark.parametrize("version", ["0.27.1", "0.28.0", "0.32.0", "0.32.1+cpu", "0.32.0.dev3+g12"])
def test_known_releases_are_accepted(version: str) -> None:
    check_release(version)


@pytest.mark.parametrize("version", ["0.27.0", "0.26.0", "0.33.0", "0.33.0rc1", "0.33.0.dev1", "1.0"])
def test_unknown_releases_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(
        UnsupportedServerError, match=rf"this is vLLM {version}; .* steers vLLM 0\.27\.1 up to, not including, 0\.33"
    ):
        check_release(version)


def config(**changed: Any) -> Any:
    """What is read of a ``VllmConfig``; names with a part before the underscore two deep."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {"runner_type": "generate", "is_diffusion": False},
        "parallel_config": {
            "use_ubatching": False,
            "prefill_context_parallel_size": 1,
            "worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker",
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
    }
    for part, values in changed.items():
        if part in parts:
            parts[part] |= values
    speculative = SimpleNamespace(**changed["speculative_config"]) if "speculative_config" in changed else None
    return SimpleNamespace(speculative_config=speculative, **{name: SimpleNamespace(**part) for name, part in parts.items()})


def test_ordinary_features_are_accepted() -> None:
    check_features(config())
    check_features(config(speculative_config={"enable_adaptive_verification": False}))
    check_features(config(parallel_config={"worker_cls": "confsteer.runtimes.vllm.worker.cpu.SteeringCPUWorker"}))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_config": {"runner_type": "pooling"}}, "does not generate text"),
        ({"model_config": {"is_diffusion": True}}, "diffusion"),
        ({"parallel_config": {"use_ubatching": True}}, "--enable-dbo"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "--prefill-context-parallel-size"),
        ({"parallel_config": {"worker_cls": "mine.Worker"}}, "the worker class mine.Worker"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "--kv-sharing-fast-prefill"),
        ({"speculative_config": {"enable_adaptive_verification": True}}, "adaptive verification"),
    ],
)
def test_what_steering_does_not_go_together_with_is_refused_by_name(changed: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedServerError, match=sentence):
        check_features(config(**changed))
