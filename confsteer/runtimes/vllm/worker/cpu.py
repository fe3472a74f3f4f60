"""vLLM's CPU worker, steered. Its own module: not every build of vLLM can import the other's."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from confsteer.runtimes.vllm.worker.steering_worker import SteeringWorker


class SteeringCPUWorker(SteeringWorker, CPUWorker):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The worker class that `confsteer.runtimes.vllm.release.WORKERS` puts in place of vLLM's."""
