"""The worker process: the model is steered, and proved to be before it serves."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group

from confsteer.errors import ProfileMismatchError, UnsupportedModelError
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.settings import Settings
from confsteer.runtimes.vllm.weights import OTHER_WEIGHTS, check_model
from confsteer.runtimes.vllm.worker.experts import keeping_experts
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
        settings = Settings.of(self.vllm_config.additional_config)
        assert settings is not None and settings.slots is not None  # noqa: PT018
        self._profile = settings.load_profile()
        with keeping_experts(self._profile) as loaded:
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        if not get_pp_group().is_last_rank:
            return  # the last layer is elsewhere
        # Add room for padding: it exceeds the largest step by less than the number of ranks that share it.
        max_tokens = self.model_runner.max_num_tokens + self.vllm_config.parallel_config.tensor_parallel_size
        model = self.model_runner.get_model()
        self._projection = attach(model, self._profile, max_tokens=max_tokens, slots=settings.slots, loaded=loaded)
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
        """Check the weights after something that may have changed them. Stop steering if they are not the profile's.

        The front process calls it by this name.
        """
        if self._projection is None:
            return True  # the last layer is elsewhere
        # Once they do not fit, wait for whole weights: more than the last layer may be another model's.
        if self._steered_requests.weights_fit:
            with contextlib.suppress(ProfileMismatchError, UnsupportedModelError), self._weights_change():
                pass
            if not self._steered_requests.weights_fit:
                logger.warning("confsteer: %s", OTHER_WEIGHTS)
        return self._steered_requests.weights_fit

    @contextlib.contextmanager
    def _weights_change(self) -> Iterator[None]:
        """Stop steering until the new weights are found to be the profile's.

        Raises:
            ProfileMismatchError: they are not. The engine goes on, and answers requests without a steering.
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
        """Run steered dummy steps through the model as it will serve, compiled and captured, and check the output.

        Every rank makes the same steps, because steps of one rank wait for those of the others.

        Raises:
            UnsupportedModelError: the output is not that of a steered model.
        """
        dtype, errors = self.vllm_config.model_config.dtype, []
        for decode in self._kinds_of_step():
            for push in self._pushes():
                outputs = self._outputs(functools.partial(self._dummy_step, decode), push, PUSHES[dtype])
                if self._projection is not None:
                    write, write_gain = self._written(push)
                    errors.append(prove(outputs, write, self._projection.norms.final, write_gain, dtype))
        if errors and get_tp_group().is_first_rank:
            logger.info("confsteer: %s; proved on every rank, relative error %.0e", start_up_line(self._profile), max(errors))

    def _pushes(self) -> list[Tensor]:
        """List the pushes to try one after the other, in the order of `edit_of`: the neurons, and the null direction."""
        profile, pushes = self._profile, []
        constant = [] if profile.null_direction is None else [profile.null_direction.push]
        if profile.steerable:
            deviation = torch.tensor([neuron.std_activation for neuron in profile.steerable])
            push = deviation.maximum(deviation.median())
            push[1::2] *= -1
            pushes.append(torch.cat([push, torch.zeros(len(constant))]))
        if constant:
            pushes.append(torch.tensor([0.0] * len(profile.steerable) + constant))
        return pushes

    def _outputs(self, step: Callable[..., Tensor], push: Tensor, sizes: Sequence[float]) -> ProofOutputs:
        """Make the steps of a proof, with every neuron active on every token."""
        one, zero, free = torch.ones_like(push), torch.zeros_like(push), torch.full_like(push, torch.inf)
        # Leave the rest neutral.
        none = push == 0
        gain, low, high = torch.where(none, one, zero), torch.where(none, -free, push), torch.where(none, free, push)
        routed = None if self._projection is None else self._projection.routed
        if routed is not None:
            routed.everywhere.fill_(True)
        try:
            return ProofOutputs(
                neutral=step(one, zero, -free, free),
                again=step(one, zero, -free, free),
                pushed=tuple(step(one, size * push, -free, free) for size in sizes),
                mixed=step(one, sizes[-1] * push, -free, free, every_other=True),
                replaced=step(gain, push, -free, free),
                clamped=step(one, zero, low, high),
            )
        finally:
            if routed is not None:
                routed.everywhere.fill_(False)

    def _written(self, push: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the write of a push ``[d_model]``, over all ranks, and the gain of a norm that it goes through."""
        assert self._projection is not None
        steered, count = self._projection, len(self._profile.steerable)
        if steered.direction is not None and push[count:].any():
            return steered.direction, None  # after such a norm
        # Add up over ranks: each knows only its own neurons' writes.
        write: Tensor = get_tp_group().all_reduce(push[:count].to(steered.writes.device) @ steered.writes)
        return write, steered.norms.write_gain

    def _kinds_of_step(self) -> list[bool]:
        """List the kinds of steps to try, because their graphs differ: decoding requests (if they fit), and reading prompts."""
        fit = min(self.vllm_config.scheduler_config.max_num_seqs, self.model_runner.max_num_tokens) >= PROOF_TOKENS
        return [False, True] if fit else [False]

    def _dummy_step(
        self, decode: bool, gain: Tensor, bias: Tensor, low: Tensor, high: Tensor, *, every_other: bool = False
    ) -> Tensor:
        """Run a dummy step. Return the final norm's output ``[tokens, d_model]``, float32, empty if this rank does not have it.

        Args:
            decode: whether the step decodes requests, or reads prompts.
            gain: gain of each column of `edit_of`, as for the next three.
            bias: see gain.
            low: see gain.
            high: see gain.
            every_other: steer every other token, from the second on, and leave the others neutral.
        """
        # Use longer requests with drafts: their tokens are verified together.
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
    """Write layer, neurons and dials of a profile on one line."""
    dials = [
        f"{dial} {low:+.2f} to {high:+.2f} nats ({', '.join(str(n.index) for n in profile.neurons(dial))})"
        for dial in profile.response
        for low, high in [profile.reach(dial)]
    ]
    return f"steering {profile.model.id}, layer {profile.model.layer}: {'; '.join(dials)}"
