"""The front process: what a request asks for is checked here, once, so that nothing a client sends reaches a worker unchecked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from confsteer.errors import NoNeuronsError, ProfileMismatchError, SteeringError
from confsteer.last_layer.edit import NEUTRAL_EDIT
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.front import counters as metrics
from confsteer.runtimes.vllm.settings import CONFIG_KEY, Settings
from confsteer.runtimes.vllm.weights import OTHER_WEIGHTS
from confsteer.steering import Steering


class Admission:
    """The check of every request to one engine."""

    def __init__(self, profile: Profile, default: Any) -> None:
        """
        Args:
            profile: to steer with.
            default: the steering of requests that ask for none.

        Raises:
            SteeringError: the default is wrong, as `canonical`.
            NoNeuronsError: as `canonical`.
        """
        self._profile = profile
        self.weights_fit = True
        """Whether the engine's weights are the profile's, as far as this process knows."""
        # Clients send the same few over and over.
        self._canonical_text = functools.lru_cache(maxsize=4096)(self._canonical)
        self.default = self.canonical(default)

    def canonical(self, asked: Any) -> str | None:
        """The one way to write what is asked for, in JSON and with presets written out; None if it changes nothing.

        Raises:
            SteeringError: it is malformed or out of reach.
            NoNeuronsError: the profile has no neurons of the kind asked for.
        """
        return self._canonical_text(asked) if isinstance(asked, str) else self._canonical(asked)

    def _canonical(self, asked: Any) -> str | None:
        steering = self._profile.resolve(Steering.parse(asked))
        if (np.stack(self._profile.edit(steering), axis=1) == NEUTRAL_EDIT).all():
            return None
        canonical = steering.model_dump_json(exclude_defaults=True)
        Steering.parse(canonical)  # as the worker will: what is written out is longer
        return canonical

    def steering_of(self, params: Any) -> str | None:
        """Look up what a request's ``SamplingParams`` ask for, or the default.

        Raises:
            VLLMValidationError: the steering is wrong, or nothing can be steered; the server answers 400 with the sentence.
        """
        asked = (params.extra_args or {}).get(CONFIG_KEY)
        try:
            steering = self.default if asked is None else self.canonical(asked)
            if steering is not None and not self.weights_fit:
                raise ProfileMismatchError(OTHER_WEIGHTS)
            return steering
        except (SteeringError, NoNeuronsError, ProfileMismatchError) as error:
            metrics.refused_requests.inc()
            raise VLLMValidationError(str(error)) from error

    def admit(self, params: Any) -> None:
        """Write into a request's ``SamplingParams`` what the workers are to do.

        Raises:
            VLLMValidationError: see `steering_of`.
        """
        steering = self.steering_of(params)
        others = {name: value for name, value in (params.extra_args or {}).items() if name != CONFIG_KEY}
        params.extra_args = others if steering is None else {**others, CONFIG_KEY: steering}
        if steering is not None:
            metrics.steered_requests.inc()


@functools.cache
def admission_of(settings: Settings) -> Admission:
    """That of an engine, by its settings as they are after start-up."""
    return Admission(settings.load_profile(), settings.default)


@functools.cache
def install(settings: Settings) -> None:
    """Check the requests of this process's engines, of which one is configured with `settings`."""
    _check_inputs()
    admission = admission_of(settings)
    for protocol in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _check_protocol(protocol, admission)


@functools.cache
def _check_inputs() -> None:
    """Every request goes through here, however it came."""
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        settings = Settings.of(self.vllm_config.additional_config)
        if request.sampling_params is not None and settings is not None:
            admission_of(settings).admit(request.sampling_params)
        return request

    InputProcessor.process_inputs = process_inputs
    metrics.install()
    _follow_weights()


def _follow_weights() -> None:
    """Refuse steered requests here, with a sentence, once the workers cannot steer: there they would end the engine."""
    call, call_async = LLMEngine.collective_rpc, AsyncLLM.collective_rpc

    @contextlib.contextmanager
    def watched(engine: Any, method: Any) -> Iterator[None]:
        settings = Settings.of(engine.vllm_config.additional_config)
        if settings is None or method not in ("reload_weights", "finish_weight_update"):
            yield
            return
        try:
            yield
        except Exception:
            admission_of(settings).weights_fit = False
            raise
        admission_of(settings).weights_fit = True

    @functools.wraps(call)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        with watched(self, method):
            return call(self, method, *args, **kwargs)

    @functools.wraps(call_async)
    async def collective_rpc_async(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        with watched(self, method):
            return await call_async(self, method, *args, **kwargs)

    LLMEngine.collective_rpc, AsyncLLM.collective_rpc = collective_rpc, collective_rpc_async


def _check_protocol(protocol: Any, admission: Admission) -> None:
    """Refuse a client's request before a stream has begun, which would already have said 200."""
    convert = protocol.to_sampling_params

    @functools.wraps(convert)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = convert(self, *args, **kwargs)
        admission.steering_of(params)
        return params

    protocol.to_sampling_params = to_sampling_params
    if not hasattr(protocol, "to_beam_search_params"):
        return
    convert_beams = protocol.to_beam_search_params

    @functools.wraps(convert_beams)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Beam search in vLLM makes requests of its own, without what the client's asked of plugins.
        if self.vllm_xargs and CONFIG_KEY in self.vllm_xargs:
            metrics.refused_requests.inc()
            raise VLLMValidationError(
                "use_beam_search does not go together with a steering of one's own: vLLM does not pass it on to the beams. "
                "Sample with n instead, or start the server with a default steering"
            )
        return convert_beams(self, *args, **kwargs)

    protocol.to_beam_search_params = to_beam_search_params
