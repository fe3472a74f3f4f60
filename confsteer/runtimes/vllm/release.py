"""The known releases of vLLM, and its features that do not go together with steering."""

from __future__ import annotations

import os
from typing import Any

from packaging.version import Version

from confsteer.errors import UnsupportedServerError

OLDEST = "0.27.1"
NEWEST = "0.32.0"
NEXT = "0.33"
"""Known releases: from the oldest up to, but not including, the next. CI tests the first two of these three.

The Makefile reads these lines. A test checks pyproject.toml and the documentation against them.
"""

WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "confsteer.runtimes.vllm.worker.gpu.SteeringGPUWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": "confsteer.runtimes.vllm.worker.cpu.SteeringCPUWorker",
}
"""vLLM's worker class -> ours."""


def check_release(version: str) -> None:
    """
    Raises:
        UnsupportedServerError: this release of vLLM is not known.
    """
    if not Version(OLDEST) <= Version(Version(version).base_version) < Version(NEXT):
        raise UnsupportedServerError(
            f"this is vLLM {version}; this confsteer steers vLLM {OLDEST} up to, not including, {NEXT}. Install one of these, or "
            "a newer confsteer; to serve without steering, leave confsteer out of additional_config"
        )


def check_features(config: Any) -> None:
    """
    Args:
        config: the engine's ``VllmConfig``.

    Raises:
        UnsupportedServerError: with this set-up steering would be wrong or absent. The message names the option.
    """
    model, parallel, speculative = config.model_config, config.parallel_config, config.speculative_config
    factor = getattr(model.hf_text_config, "routed_scaling_factor", None)
    reasons = {
        "a model that does not generate text (--runner)": model.runner_type != "generate",
        f"float16 (--dtype bfloat16): it divides the residual by {factor} there": str(model.dtype) == "torch.float16"
        and factor not in (None, 1),
        "a diffusion language model": getattr(model, "is_diffusion", False),
        "micro-batches (--enable-dbo, --ubatch-size): each would be steered as the first": parallel.use_ubatching,
        "--prefill-context-parallel-size: tokens are not in the order of their requests": parallel.prefill_context_parallel_size
        > 1,
        "--kv-sharing-fast-prefill: the last layers leave tokens out": config.cache_config.kv_sharing_fast_prefill,
        "adaptive verification of drafts: which request a token belongs to is known on the device only": getattr(
            speculative, "enable_adaptive_verification", False
        ),
        "VLLM_USE_RUST_FRONTEND: requests would reach the engine unchecked": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0",
        f"the worker class {parallel.worker_cls}": parallel.worker_cls not in (*WORKERS, *WORKERS.values()),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedServerError(f"confsteer does not steer vLLM with {reason}. Serve without it, or without confsteer")
