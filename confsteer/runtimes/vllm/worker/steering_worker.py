"""The worker process: the model is steered, and proved to be before it serves."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group

from confsteer.errors import ProfileMismatchError, UnsupportedModelError
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.settings import Settings
from confsteer.runtimes.vllm.weights import OTHER_WEIGHTS, check_model
from confsteer.runtimes.vllm.worker.projection import SteeredProjection, attach, check_unchanged
from confsteer.runtimes.vllm.worker.proof import PUSHES, ProofOutputs, prove
from confsteer.runtimes.vllm.worker.requests import SteeredRequests, follow_loading, follow_runner
from confsteer.runtimes.vllm.worker.slots import Slots

logger = logging.getLogger("vllm.confsteer")

PROOF_TOKENS = 4


class SteeringWorker:
    """Mixin that goes in front of a worker class of vLLM."""

    vllm_config: Any
    model_runner: Any
    use_v2_model_runner: bool
    _projection: SteeredProjection | None = None
    _steered_requests: SteeredRequests

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        settings = Settings.of(self.vllm_config.additional_config)
        assert settings is not None and settings.slots is not None  # noqa: PT018
        self._profile = settings.load_profile()
        if not get_pp_group().is_last_rank:
            return  # the last layer is elsewhere
        # Padding may go beyond the largest step by less than the ranks that share it.
        max_tokens = self.model_runner.max_num_tokens + self.vllm_config.parallel_config.tensor_parallel_size
        model = self.model_runner.get_model()
        self._projection = attach(model, self._profile, max_tokens=max_tokens, slots=settings.slots)
        self._steered_requests = SteeredRequests(self._profile, self._projection, Slots(settings.slots), self.vllm_config)
        follow_runner(self.model_runner, self._steered_requests, self.weights_fit_profile, v2=self.use_v2_model_runner)
        follow_loading(model, self._steered_requests)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._prove()
        return result

    def reload_weights(self, weights_iterator: Any = None, *args: Any, **kwargs: Any) -> None:
        with self._weights_change():
            super().reload_weights(weights_iterator, *args, **kwargs)  # type: ignore[misc]
            if weights_iterator is None:  # they came from the disk, as at start-up
                check_model(self._profile, self.model_runner.model_config)

    def finish_weight_update(self, *args: Any, **kwargs: Any) -> None:
        with self._weights_change():
            super().finish_weight_update(*args, **kwargs)  # type: ignore[misc]

    def weights_fit_profile(self) -> bool:
        """Look at the weights after something that may have changed them; steer no more if they are not the profile's.

        The front process calls it by this name.
        """
        if self._projection is None:
            return True  # the last layer is elsewhere
        # Once they do not fit, only those who bring whole weights can mend it: more than the last layer may be another's.
        if self._steered_requests.weights_fit:
            with contextlib.suppress(ProfileMismatchError, UnsupportedModelError), self._weights_change():
                pass
            if not self._steered_requests.weights_fit:
                logger.warning("confsteer: %s", OTHER_WEIGHTS)
        return self._steered_requests.weights_fit

    @contextlib.contextmanager
    def _weights_change(self) -> Iterator[None]:
        """Steer no more until the weights that have come are found to be the profile's.

        Raises:
            ProfileMismatchError: they are not. The engine lives on: requests without a steering are answered.
        """
        if self._projection is None:
            yield
            return
        self._steered_requests.weights_fit = False
        try:
            yield
        finally:
            self._steered_requests.weights_unchecked = False
        check_unchanged(self.model_runner.get_model(), self._profile, self._projection)
        self._steered_requests.weights_fit = True

    def _prove(self) -> None:
        """Steer dummy steps through the model as it will serve, compiled and captured, and look at what comes out.

        Every rank makes the same steps, because steps of one rank wait for those of the others.

        Raises:
            UnsupportedModelError: it is not what steering should do.
        """
        deviation = torch.tensor([neuron.std_activation for neuron in self._profile.steerable])
        push = deviation.maximum(deviation.median())
        push[1::2] *= -1
        dtype = self.vllm_config.model_config.dtype
        sizes = PUSHES[dtype]
        one, zero, free = torch.ones_like(push), torch.zeros_like(push), torch.full_like(push, torch.inf)
        errors = []
        for decode in self._kinds_of_step():
            step = functools.partial(self._dummy_step, decode)
            outputs = ProofOutputs(
                neutral=step(one, zero, -free, free),
                again=step(one, zero, -free, free),
                pushed=tuple(step(one, size * push, -free, free) for size in sizes),
                mixed=step(one, sizes[-1] * push, -free, free, every_other=True),
                replaced=step(zero, push, -free, free),
                clamped=step(one, zero, push, push),
            )
            if self._projection is not None:
                # Each rank knows what its own neurons write.
                write = get_tp_group().all_reduce(push.to(self._projection.writes.device) @ self._projection.writes)
                errors.append(prove(outputs, write, self._projection.final_norm, self._projection.write_gain, dtype))
        if errors and get_tp_group().is_first_rank:
            logger.info("confsteer: %s; proved on every rank, relative error %.0e", start_up_line(self._profile), max(errors))

    def _kinds_of_step(self) -> list[bool]:
        """Whether to try steps that decode requests, where so many fit, and steps that read prompts: their graphs differ."""
        fit = min(self.vllm_config.scheduler_config.max_num_seqs, self.model_runner.max_num_tokens) >= PROOF_TOKENS
        return [False, True] if fit else [False]

    def _dummy_step(
        self, decode: bool, gain: Tensor, bias: Tensor, low: Tensor, high: Tensor, *, every_other: bool = False
    ) -> Tensor:
        """Output of the final norm ``[tokens, d_model]``, float32, where this rank has it; empty elsewhere.

        Args:
            decode: as a step that decodes requests, else as one that reads prompts.
            gain: as the next three, of each of the profile's neurons.
            bias: see gain.
            low: see gain.
            high: see gain.
            every_other: steer every other token, from the second on, and leave the others neutral.
        """
        # With drafts, the tokens of each request are verified together.
        together = getattr(self.model_runner, "uniform_decode_query_len", 0) or getattr(self.model_runner, "decode_query_len", 1)
        tokens = PROOF_TOKENS * together if decode else min(PROOF_TOKENS, self.model_runner.max_num_tokens)
        if self._projection is not None:
            edit = torch.stack([gain, bias, low, high])[:, None, self._projection.neurons]
            self._projection.table.write([1], edit)
            self._projection.table.point(torch.arange(tokens) % 2 if every_other else torch.ones(tokens, dtype=torch.int64))
        hidden_states, _ = self.model_runner._dummy_run(tokens, force_attention=True, uniform_decode=decode)
        if self._projection is None:
            return torch.empty(0)
        self._projection.table.clear()
        output: Tensor = hidden_states[:tokens].float().clone()
        return output


def start_up_line(profile: Profile) -> str:
    """Layer, neurons and dials of a profile, in a line."""
    dials = [
        f"{dial} {low:+.2f} to {high:+.2f} nats ({', '.join(str(n.index) for n in profile.neurons(dial))})"
        for dial in profile.response
        for low, high in [profile.reach(dial)]
    ]
    return f"steering {profile.model.id}, layer {profile.model.layer}: {'; '.join(dials)}"
