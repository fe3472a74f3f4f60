"""Steering inside vLLM, per request, in the compiled graph.

vLLM calls `register` in each of its processes (entry-point group ``vllm.general_plugins``). Nothing more happens until an engine
is configured with ``additional_config={"confsteer": {"profile": ...}}``. Then these come into play, in this order:

release.py               which vLLM this is, and which of its features steering does not go together with
arguments.py             what a command line says of ``additional_config``
settings.py              what the engine was configured with
spelling.py              the text of an engine's tokens
edit.py                  a steering as the numbers that the device has
weights.py               whether a checkpoint has the weights that the profile is of
out_of_reach.py          mixtures of experts that cannot be steered, and the way out

front/                   the front process
    command.py           ``confsteer serve``
    startup.py           settings, profile and model are checked, the worker class is chosen
    places.py            where a steering stands in what a client sends
    admission.py         a request's steering is checked and written in one canonical way, or refused
    door.py              a client's steering is found before its request is taken, and kept for all that it leads to
    changes.py           weights that change later: steered requests are refused
    counters.py          Prometheus counters
    endpoint.py          GET /confsteer, and the page

worker/                  the worker process, which imports nothing of the front, nor the front of it
    steering_worker.py   the model is steered, and proved to be before it serves
    gpu.py, cpu.py       that in front of vLLM's own worker classes
    projection.py        the last layer, steered: what is edited where
    find.py              where projections and norms are in vLLM's model
    experts.py           the same of a mixture of experts, and the check of what its kernel computes
    requests.py          which token of a step belongs to which request, in both of vLLM's model runners
    table.py             the steerings of a step on the device
    edits.py             the edits at each place: what becomes part of the graph; they know nothing of vLLM
    slots.py             which row of the table holds which steering; it knows nothing of vLLM
    proof.py             what steering must do to the model's output, numerically
"""

from __future__ import annotations

import functools
import sys


@functools.cache
def register() -> None:
    """Watch for each engine's configuration as it is made: the entry point of ``vllm.general_plugins``."""
    from vllm.config import VllmConfig

    complete = VllmConfig.__post_init__

    @functools.wraps(complete)
    def complete_and_prepare(self: VllmConfig) -> None:
        complete(self)
        if self.model_config is None:
            return  # of no engine, but of a part of vLLM that asks for defaults
        from confsteer.errors import ConfsteerError
        from confsteer.runtimes.vllm.arguments import ask_for_confsteer, resembles

        settings = self.additional_config if isinstance(self.additional_config, dict) else {}
        if "confsteer" in settings:
            import vllm

            from confsteer.runtimes.vllm.release import check_release

            try:
                # Check the release before anything that relies on vLLM's internals is imported.
                check_release(vllm.__version__)
                from confsteer.runtimes.vllm.front.startup import prepare

                prepare(self)
            except ValueError as error:  # pydantic would wrap the sentence in one of its own
                raise ConfsteerError(str(error)) from error
        elif misspelt := [name for name in settings if resembles(name, "confsteer")]:
            raise ConfsteerError(f"additional_config: nothing reads {misspelt[0]!r}: write 'confsteer'")
        elif ask_for_confsteer(sys.argv):
            raise ConfsteerError(
                "the command line asks for confsteer, and the engine's additional_config has come out without it: "
                f"{self.additional_config}. A later --additional-config takes the place of an earlier one, and dotted ones come "
                'last: say it all in one, --additional-config \'{"confsteer": {"profile": PROFILE}, ...}\''
            )

    VllmConfig.__post_init__ = complete_and_prepare
