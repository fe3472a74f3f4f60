"""Steering inside vLLM, per request, in the compiled graph.

vLLM calls `register` in each of its processes (entry-point group ``vllm.general_plugins``). Nothing more happens until an engine
is configured with ``additional_config={"confsteer": {"profile": ...}}``. Then, in the order of things:

startup.py      the front process: settings, profile and model are checked, the worker class is chosen
release.py      which vLLM this is, and which of its features steering does not go together with
weights.py      whether the checkpoint has the weights that the profile is of
admission.py    the front process: a request's steering is checked and written in one canonical way, or refused
metrics.py      Prometheus counters
endpoint.py     GET /confsteer
worker.py       the worker process: the model is steered, and proved to be before it serves
projection.py   where the last MLP's output projection is in vLLM's model, and the edit on its input
batch.py        which token of a step belongs to which request, in both of vLLM's model runners
slots.py        a table of steerings, one row each; it knows nothing of vLLM
proof.py        what steering must do to the model's output, numerically
command.py      ``confsteer serve``
"""

from __future__ import annotations

import functools


@functools.cache
def register() -> None:
    """Entry point of ``vllm.general_plugins``: look at each engine's configuration when it is made."""
    from vllm.config import VllmConfig

    complete = VllmConfig.__post_init__

    @functools.wraps(complete)
    def complete_and_prepare(self: VllmConfig) -> None:
        complete(self)
        if isinstance(self.additional_config, dict) and "confsteer" in self.additional_config:
            import vllm

            from confsteer.errors import ConfsteerError
            from confsteer.vllm.release import check_release

            try:
                # Before anything that relies on vLLM's internals is imported.
                check_release(vllm.__version__)
                from confsteer.vllm.startup import prepare

                prepare(self)
            except ValueError as error:  # pydantic would wrap the sentence in one of its own
                raise ConfsteerError(str(error)) from error

    VllmConfig.__post_init__ = complete_and_prepare
