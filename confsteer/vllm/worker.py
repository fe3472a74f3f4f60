"""The worker process: the model is steered, and proved to be before it serves."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group
from vllm.utils.import_utils import resolve_obj_by_qualname

from confsteer.edit import steerable
from confsteer.profile import Profile
from confsteer.vllm.batch import Batch, follow_runner
from confsteer.vllm.projection import SteeredProjection, attach
from confsteer.vllm.proof import Outputs, prove
from confsteer.vllm.release import WORKERS
from confsteer.vllm.settings import Settings
from confsteer.vllm.slots import Slots

logger = logging.getLogger("vllm.confsteer")

PUSHES = (4.0, 16.0, 64.0)
"""Of the neurons for the proof, in their standard deviations: one of them is about as large as what it is added to."""
PROOF_TOKENS = 4


class _SteeringWorker:
    """What is put in front of a worker class of vLLM."""

    vllm_config: Any
    model_runner: Any
    use_v2_model_runner: bool
    _projection: SteeredProjection | None = None
    _batch: Batch | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        settings = Settings.of(self.vllm_config.additional_config)
        assert settings is not None
        self._profile = settings.load_profile()
        if not get_pp_group().is_last_rank:
            return  # the last layer is elsewhere
        slots = Slots(self.vllm_config.scheduler_config.max_num_seqs)
        # Padding may go beyond the largest step by less than the ranks that share it.
        max_tokens = self.model_runner.max_num_tokens + self.vllm_config.parallel_config.tensor_parallel_size
        model = self.model_runner.get_model()
        self._projection = attach(model, self._profile, max_tokens=max_tokens, slots=slots.capacity)
        self._batch = Batch(self._profile, self._projection, slots)
        follow_runner(self.model_runner, self._batch, v2=self.use_v2_model_runner)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._prove()
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._batch is not None:
            self._batch.note(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def _prove(self) -> None:
        """Steer dummy steps through the model as it will serve, compiled and captured, and look at what comes out.

        Every rank makes the same steps, because steps of one rank wait for those of the others.

        Raises:
            UnsupportedModelError: it is not what steering should do.
        """
        deviation = torch.tensor([neuron.std_activation for neuron in steerable(self._profile)])
        push = deviation.maximum(deviation.median())
        push[1::2] *= -1
        one, zero, free = torch.ones_like(push), torch.zeros_like(push), torch.full_like(push, torch.inf)
        every, other = torch.ones(PROOF_TOKENS, dtype=torch.int64), torch.arange(PROOF_TOKENS) % 2

        neutral, again = (self._dummy_step(one, zero, -free, free, every) for _ in range(2))
        pushed = [self._dummy_step(one, size * push, -free, free, every) for size in PUSHES]
        mixed = self._dummy_step(one, PUSHES[-1] * push, -free, free, other)
        replaced = self._dummy_step(zero, push, -free, free, every)
        clamped = self._dummy_step(one, zero, push, push, every)
        if self._projection is None:
            return
        # Each rank knows what its own neurons write.
        write = get_tp_group().all_reduce(push.to(self._projection.writes.device) @ self._projection.writes)
        outputs = Outputs(neutral, again, tuple(pushed), mixed, replaced, clamped)
        dtype = self.vllm_config.model_config.dtype
        error = prove(outputs, write, self._projection.final_norm, self._projection.write_gain, dtype)
        if get_tp_group().is_first_rank:
            logger.info("confsteer: %s; proved on every rank, relative error %.0e", describe(self._profile), error)

    def _dummy_step(self, gain: Tensor, bias: Tensor, low: Tensor, high: Tensor, rows: Tensor) -> Tensor:
        """Output of the final norm ``[tokens, d_model]``, float32, where this rank has it; empty elsewhere.

        Args:
            gain: as the next three, of each of the profile's neurons, for row 1 of the table.
            bias: see gain.
            low: see gain.
            high: see gain.
            rows: of each token, 0 or 1.
        """
        if self._projection is not None:
            rule = torch.stack([gain, bias, low, high])[:, None, self._projection.neurons]
            self._projection.table.write([1], rule)
            self._projection.table.point(rows)
        # As a step of decoding requests where so many fit: the graph that generates.
        decode = self.vllm_config.scheduler_config.max_num_seqs >= PROOF_TOKENS
        hidden_states, _ = self.model_runner._dummy_run(PROOF_TOKENS, force_attention=True, uniform_decode=decode)
        if self._projection is None:
            return torch.empty(0)
        self._projection.table.clear()
        output: Tensor = hidden_states[:PROOF_TOKENS].float().clone()
        return output


def describe(profile: Profile) -> str:
    """Layer, neurons and dials of a profile, in a line."""
    dials = [
        f"{dial} {low:+.2f} to {high:+.2f} nats ({', '.join(str(n.index) for n in profile.neurons(dial))})"
        for dial in profile.response
        for low, high in [profile.reach(dial)]
    ]
    return f"steering {profile.model.id}, layer {profile.model.layer}: {'; '.join(dials)}"


def __getattr__(name: str) -> Any:
    """``Steering…`` in front of each of vLLM's workers; vLLM asks for them by name, and not all can be imported everywhere."""
    for theirs, ours in WORKERS.items():
        if ours == f"{__name__}.{name}":
            return type(name, (_SteeringWorker, resolve_obj_by_qualname(theirs)), {"__module__": __name__})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
