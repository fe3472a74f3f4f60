"""The check of every request, once, in the front process. Nothing from a client reaches a worker unchecked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from confsteer.errors import NoNeuronsError, ProfileMismatchError, SteeringError
from confsteer.last_layer.edit import NEUTRAL_EDIT
from confsteer.profile.profile import Profile
from confsteer.runtimes.positions import marker_of
from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.runtimes.vllm.edit import edit_of
from confsteer.runtimes.vllm.front import counters as metrics
from confsteer.runtimes.vllm.front.places import steering_in
from confsteer.runtimes.vllm.settings import Settings
from confsteer.runtimes.vllm.spelling import spelling_of
from confsteer.runtimes.vllm.weights import OTHER_WEIGHTS
from confsteer.steering import Steering


class Admission:
    """The check of every request to one engine."""

    def __init__(self, profile: Profile, default: Any, config: Any) -> None:
        """
        Args:
            profile: profile to steer with.
            default: steering of requests that ask for none.
            config: the engine's ``VllmConfig``.

        Raises:
            SteeringError: the default is wrong; see `canonical`.
            NoNeuronsError: see `canonical`.
        """
        self._profile = profile
        self._spelling_of = functools.cache(functools.partial(spelling_of, config))
        self.weights_fit = True
        """Whether the engine's weights are the profile's, as far as this process knows."""
        self.weights_unchecked = False
        """Whether the weights may have changed while the workers slept."""
        # Cache the results: clients send the same few steerings over and over.
        self._canonical_text = functools.lru_cache(maxsize=4096)(self._canonical)
        self.default = self.canonical(default)

    def canonical(self, asked: Any) -> str | None:
        """Write a steering in its one canonical form: JSON, with presets written out. None if it changes nothing.

        Raises:
            SteeringError: it is malformed or out of reach.
            NoNeuronsError: the profile has no neurons of the kind asked for.
        """
        return self._canonical_text(asked) if isinstance(asked, str) else self._canonical(asked)

    def _canonical(self, asked: Any) -> str | None:
        steering = self._profile.resolve(Steering.parse(asked))
        if (edit_of(self._profile, steering).T == NEUTRAL_EDIT).all():
            return None
        marker_of(steering.positions, self._spelling_of)
        canonical = steering.model_dump_json(exclude_defaults=True)
        Steering.parse(canonical)  # as the worker will: what is written out is longer
        return canonical

    def asked_in(self, body: Any) -> Any:
        """Find the steering that a client's body asks for, as it was sent. None if it asks for none.

        Raises:
            VLLMValidationError: it is wrong or in a wrong place, or nothing can be steered. The server answers 400 with the
                sentence.
        """
        with _refusals():
            asked = steering_in(body)
            if asked is not None:
                self._steering_of(asked)
            return asked

    def check(self, params: Any) -> str | None:
        """Find the canonical steering that a request's ``SamplingParams`` ask for, or the default.

        Raises:
            VLLMValidationError: see `asked_in`.
        """
        with _refusals():
            return self._steering_of(steering_in({"sampling_params": {"extra_args": params.extra_args}}))

    def refuse_beams(self, asked: Any) -> None:
        """Refuse a steering by a window in beam search: each step of a beam is a request of its own to vLLM.

        Raises:
            VLLMValidationError: the steering has one.
        """
        with _refusals():
            steering = self._steering_of(asked)
            positions = "all" if steering is None else Steering.parse(steering).positions
            if not isinstance(positions, str):
                raise SteeringError(
                    f"positions={positions} does not go together with beam search in vLLM, which makes a request of each step of "
                    "a beam, and forgets which tokens of it were generated: leave one of them out, or steer in transformers"
                )

    def _steering_of(self, asked: Any) -> str | None:
        steering = self.default if asked is None else self.canonical(asked)
        if steering is not None and not self.weights_fit:
            raise ProfileMismatchError(OTHER_WEIGHTS)
        return steering

    def admit(self, params: Any) -> None:
        """Write the canonical steering into a request's ``SamplingParams``, for the workers.

        Raises:
            VLLMValidationError: see `asked_in`.
        """
        steering = self.check(params)
        others = {name: value for name, value in (params.extra_args or {}).items() if name != CONFIG_KEY}
        params.extra_args = others if steering is None else {**others, CONFIG_KEY: steering}
        if steering is not None:
            metrics.steered_requests.inc()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Count refused requests, and make the server answer them with the sentence."""
    try:
        yield
    except (SteeringError, NoNeuronsError, ProfileMismatchError) as error:
        metrics.refused_requests.inc()
        raise VLLMValidationError(str(error)) from error


admissions: dict[Settings, Admission] = {}
"""The admissions of this process's engines."""


def admission_of(settings: Settings, config: Any) -> Admission:
    """Find the admission of an engine, by its settings after start-up and its ``VllmConfig``."""
    if settings not in admissions:
        admissions[settings] = Admission(settings.load_profile(), settings.default, config)
    return admissions[settings]


def admission_to(engine: Any) -> Admission | None:
    """Find the admission of an object with an engine's ``vllm_config``. None if the engine is not configured to steer."""
    config = getattr(engine, "vllm_config", None)
    settings = Settings.of(getattr(config, "additional_config", None))
    return None if settings is None else admission_of(settings, config)


def install() -> None:
    """Check every request to this process's engines, whatever its route."""
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        admission = admission_to(self)
        if request.sampling_params is not None and admission is not None:
            admission.admit(request.sampling_params)
        return request

    InputProcessor.process_inputs = process_inputs
