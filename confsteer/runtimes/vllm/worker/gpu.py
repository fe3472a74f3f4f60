"""vLLM's GPU worker, steered. Its own module: not every build of vLLM can import the other's."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from confsteer.runtimes.vllm.worker.steering_worker import SteeringWorker


class SteeringGPUWorker(SteeringWorker, Worker):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The worker class that `confsteer.runtimes.vllm.release.WORKERS` puts in place of vLLM's."""
