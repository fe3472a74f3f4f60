"""The front process: what a request asks for is checked here, once, so that nothing a client sends reaches a worker unchecked."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from confsteer.edit import neuron_edit, resolve
from confsteer.errors import NoNeuronsError, SteeringError
from confsteer.profile import Profile
from confsteer.steering import Steering
from confsteer.vllm import metrics
from confsteer.vllm.settings import KEY, Settings

NEUTRAL_EDIT = np.array([1, 0, -np.inf, np.inf], dtype=np.float32)[:, None]


class Admission:
    """Steerings of one profile."""

    def __init__(self, profile: Profile, default: Any = None) -> None:
        self.profile = profile
        self.default = default
        # Clients send the same few over and over.
        self._canonical_text = functools.lru_cache(maxsize=4096)(self._canonical)

    def canonical(self, asked: Any) -> str | None:
        """The one way to write what is asked for, in JSON and with presets written out; None if it changes nothing.

        Raises:
            SteeringError: it is malformed or out of reach.
            NoNeuronsError: the profile has no neurons of the kind asked for.
        """
        return self._canonical_text(asked) if isinstance(asked, str) else self._canonical(asked)

    def _canonical(self, asked: Any) -> str | None:
        steering = resolve(Steering.parse(asked), self.profile)
        if (np.stack(neuron_edit(steering, self.profile)) == NEUTRAL_EDIT).all():
            return None
        return steering.model_dump_json(exclude_defaults=True)

    def admit(self, params: Any) -> None:
        """Write into a request's ``SamplingParams`` what the workers are to do, the default if it asks for nothing.

        Raises:
            VLLMValidationError: the steering is wrong; the server answers 400 with the sentence.
        """
        others = dict(params.extra_args or {})
        try:
            asked = self.canonical(others.pop(KEY)) if others.get(KEY) is not None else self.default
        except (SteeringError, NoNeuronsError) as error:
            metrics.refused_requests.inc()
            raise VLLMValidationError(str(error)) from error
        if asked is not None:
            others[KEY] = asked
            metrics.steered_requests.inc()
        params.extra_args = others or None


@functools.cache
def install() -> None:
    """Check the requests of every configured engine of this process."""
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if request.sampling_params is not None and (admission := _admission_of(self)) is not None:
            admission.admit(request.sampling_params)
        return request

    InputProcessor.process_inputs = process_inputs
    for protocol in (ChatCompletionRequest, CompletionRequest):
        _refuse_beams(protocol)
    metrics.install()


def _admission_of(processor: Any) -> Admission | None:
    if not hasattr(processor, "confsteer"):
        settings = Settings.of(processor.vllm_config.additional_config)
        processor.confsteer = None if settings is None else Admission(settings.load_profile(), settings.default or None)
    admission: Admission | None = processor.confsteer
    return admission


def _refuse_beams(protocol: Any) -> None:
    """Beam search in vLLM makes requests of its own, without what the client's asked of plugins."""
    convert = protocol.to_beam_search_params

    @functools.wraps(convert)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.vllm_xargs and KEY in self.vllm_xargs:
            metrics.refused_requests.inc()
            raise VLLMValidationError(
                "use_beam_search does not go together with a steering of one's own: vLLM does not pass it on to the beams. "
                "Sample with n instead, or start the server with a default steering"
            )
        return convert(self, *args, **kwargs)

    protocol.to_beam_search_params = to_beam_search_params
