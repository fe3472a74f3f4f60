from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from confsteer import UnsupportedServerError
from confsteer.runtimes.vllm.release import NEWEST, NEXT, OLDEST, check_features, check_release
from tests.paths import ROOT


def test_every_place_names_the_same_releases() -> None:
    assert Version(OLDEST) <= Version(NEWEST) < Version(NEXT)
    expected = [
        ("pyproject.toml", f'vllm = ["vllm>={OLDEST},<{NEXT}"]'),
        ("docs/vllm.md", f"vLLM {OLDEST} to {NEWEST}, "),
        ("examples/kubernetes.md", f"FROM vllm/vllm-openai:v{NEWEST}\n"),
        ("examples/kubernetes.md", f"vllm-confsteer:v{NEWEST}\n"),
    ]
    # Collect them, so that one run names all.
    assert not [(file, words) for file, words in expected if words not in (ROOT / file).read_text(encoding="utf-8")]
    makefile = subprocess.run(["make", "-pn", "lint"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert f"VLLM_OLDEST := {OLDEST}\n" in makefile
    assert f"VLLM_NEWEST := {NEWEST}\n" in makefile


@pytest.mark.parametrize("version", [OLDEST, "0.28.0", NEWEST, f"{NEWEST}+cpu", f"{NEWEST}.dev3+g12"])
def test_known_releases_are_accepted(version: str) -> None:
    check_release(version)


@pytest.mark.parametrize("version", ["0.27.0", "0.26.0", f"{NEXT}.0", f"{NEXT}.0rc1", f"{NEXT}.0.dev1", "1.0"])
def test_unknown_releases_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(
        UnsupportedServerError, match=rf"this is vLLM {version}; .* steers vLLM {OLDEST} up to, not including, {NEXT}"
    ):
        check_release(version)


def config(**changed: Any) -> Any:
    """What is read of a ``VllmConfig``; names with a part before the underscore two deep."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "runner_type": "generate",
            "is_diffusion": False,
            "dtype": "torch.float16",
            "hf_text_config": SimpleNamespace(),
        },
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
    factor = SimpleNamespace(routed_scaling_factor=2.5)
    check_features(config(model_config={"dtype": "torch.bfloat16", "hf_text_config": factor}))
    check_features(config(speculative_config={"enable_adaptive_verification": False}))
    check_features(config(parallel_config={"worker_cls": "confsteer.runtimes.vllm.worker.cpu.SteeringCPUWorker"}))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_config": {"runner_type": "pooling"}}, "does not generate text"),
        ({"model_config": {"is_diffusion": True}}, "diffusion"),
        ({"model_config": {"hf_text_config": SimpleNamespace(routed_scaling_factor=2.5)}}, "--dtype bfloat16.*residual by 2.5"),
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
