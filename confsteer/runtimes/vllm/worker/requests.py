"""The request that each token of a step belongs to, and so its steering, in both of vLLM's model runners."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confsteer.errors import ProfileMismatchError
from confsteer.profile.profile import Profile
from confsteer.runtimes.positions import Marker, Window, marker_of
from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.runtimes.vllm.edit import edit_of
from confsteer.runtimes.vllm.spelling import spelling_of
from confsteer.runtimes.vllm.weights import OTHER_WEIGHTS
from confsteer.runtimes.vllm.worker.projection import SteeredProjection
from confsteer.runtimes.vllm.worker.slots import NEUTRAL, Slots, token_rows
from confsteer.steering import First, Positions, Steering

NOT_STEERED = (0.0, 0.0)
"""Span of a request without a steering."""


class _Edit(NamedTuple):
    edit: NDArray[np.float32]
    """``[4, columns]``: gain, bias, low and high; see `edit_of`."""
    positions: Positions
    marker: Marker | None
    """Looked for where steering begins after one; else None."""


class _Request(NamedTuple):
    steering: str
    """Canonical, see `confsteer.runtimes.vllm.front.admission`."""
    prompt: int
    """Tokens of the prompt."""
    window: Window

    @property
    def span(self) -> tuple[float, float]:
        """Positions that are steered, from the first to the one after the last: each chooses the token after it."""
        begin, end = self.window.span
        return begin + self.prompt - 1, end + self.prompt - 1

    def read(self, tokens: Sequence[int], at: int) -> None:
        """Learn of the tokens at positions from `at` on."""
        given = max(self.prompt - at, 0)
        self.window.read(tokens[given:], max(at - self.prompt, 0))


class Step(NamedTuple):
    """Tokens of the step that comes next, as the device has them: some are known nowhere else."""

    tokens: Tensor
    """``[tokens]``"""
    positions: Tensor
    """``[tokens]``, in the text of each token's request."""


class SteeredRequests:
    """The steered requests that a worker holds, and what the device's tables say at the moment.

    Args:
        profile: to steer with.
        projection: where.
        slots: rows of its table.
        config: the engine's ``VllmConfig``.
    """

    def __init__(self, profile: Profile, projection: SteeredProjection, slots: Slots, config: Any) -> None:
        self._profile = profile
        self._projection = projection
        self._slots = slots
        self._drafts = config.speculative_config is not None
        self._spelling_of = functools.cache(functools.partial(spelling_of, config))
        self._requests: dict[str, _Request] = {}
        self._edit_of = functools.lru_cache(maxsize=4096)(self._read)
        self._filled: tuple[list[str], NDArray[Any]] | None = None
        """Requests and token counts of a step whose rows are still right for the next one like it."""
        self._neutral = True
        """Whether all rows on the device are neutral."""
        self.weights_fit = True
        """Whether the model's weights are the profile's; if not, no request is steered."""
        self.weights_unchecked = False
        """Whether some were loaded that nobody has looked at."""

    def note(self, scheduler_output: Any) -> None:
        """Before each step: remember the steerings of new requests, forget finished ones."""
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            steering = params.extra_args.get(CONFIG_KEY) if params is not None and params.extra_args else None
            self._requests.pop(new.req_id, None)
            if steering is not None:
                prompt = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
                edit = self._edit_of(steering)
                request = _Request(steering, len(prompt), Window(edit.positions, edit.marker))
                # The second model runner gets requests that were preempted as new ones, with what they have generated.
                request.read(getattr(new, "prefill_token_ids", None) or (), at=0)
                self._requests[new.req_id] = request
            self._filled = None

    def follow(
        self,
        request_ids: Sequence[str],
        counts: NDArray[np.integer],
        computed: NDArray[np.integer],
        step: Callable[[], Step],
    ) -> None:
        """Have the tokens of the step that comes next follow their requests' steerings.

        Args:
            request_ids: in the order of their tokens.
            counts: tokens of each in this step.
            computed: tokens of each before it; more than there are, where drafts are not known to be given up.
            step: asked for where the windows of some requests go by their tokens. It waits for the device.

        Raises:
            ProfileMismatchError: one is to be steered, and the weights are not the profile's.
        """
        if not self._requests and self._neutral:
            return
        if not self.weights_fit and any(request_id in self._requests for request_id in request_ids):
            raise ProfileMismatchError(OTHER_WEIGHTS)
        if self._filled is not None and self._filled[0] == request_ids and np.array_equal(self._filled[1], counts):
            return
        requests = [self._requests.get(request_id) for request_id in request_ids]
        computed = self._read_step(requests, counts, computed, step)
        new = self._slots.assign(request.steering for request in requests if request is not None)
        if new:
            edits = torch.from_numpy(np.stack([self._edit_of(steering).edit for steering in new], axis=1))
            self._projection.table.write(list(new.values()), edits[..., self._projection.neurons])
        rows = [NEUTRAL if request is None else self._slots[request.steering] for request in requests]
        spans = [NOT_STEERED if request is None else request.span for request in requests]
        self._neutral = not self._requests
        if self._neutral:
            # Clear every row, including those a longer earlier step left behind: later steps skip this code.
            self._projection.table.clear()
        else:
            self._projection.table.point(torch.from_numpy(token_rows(rows, counts, computed, spans)))
        # Positions only rise: once all are past where steering begins, and ends, a step of the same shape needs the same rows.
        begin, end = np.asarray(spans).T
        whole = bool(((end <= computed) | ((begin <= computed) & np.isposinf(end))).all())
        self._filled = (list(request_ids), counts.copy()) if whole else None

    def _read_step(
        self,
        requests: Sequence[_Request | None],
        counts: NDArray[np.integer],
        computed: NDArray[np.integer],
        step: Callable[[], Step],
    ) -> NDArray[np.integer]:
        """Read the tokens of requests whose windows are not settled; how many of each request there are before this step."""
        unsettled = {at: request for at, request in enumerate(requests) if request is not None and not request.window.settled}
        # Drafts that are given up are known to the device alone.
        drafted = self._drafts and any(
            request is not None and isinstance(self._edit_of(request.steering).positions, First) for request in requests
        )
        if not unsettled and not drafted:
            return computed
        tokens, positions = (tensor.cpu().numpy() for tensor in step())
        starts = np.cumsum(counts) - counts
        computed = positions[starts]
        for at, request in unsettled.items():
            request.read(tokens[starts[at] : starts[at] + counts[at]].tolist(), int(computed[at]))
        return computed

    def _read(self, canonical: str) -> _Edit:
        steering = Steering.parse(canonical)
        marker = marker_of(steering.positions, self._spelling_of)
        return _Edit(edit_of(self._profile, steering), steering.positions, marker)


def follow_loading(model: Any, requests: SteeredRequests) -> None:
    """Note that weights are loaded into a model, whoever does it."""
    load = model.load_weights

    @functools.wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        requests.weights_unchecked = True
        return load(*args, **kwargs)

    model.load_weights = load_weights


def follow_runner(runner: Any, requests: SteeredRequests, check_weights: Callable[[], object], *, v2: bool) -> None:
    """Tell `requests` of each step of a model runner: of its requests before it, and of their order once it is known.

    Args:
        runner: one of vLLM's.
        requests: to tell.
        check_weights: called before a step after weights were loaded that nobody has looked at.
        v2: whether it is the second of vLLM's model runners.
    """
    execute, prepare = runner.execute_model, runner.prepare_inputs if v2 else runner._prepare_inputs

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if requests.weights_unchecked:
            check_weights()
        requests.note(scheduler_output)
        return execute(scheduler_output, *args, **kwargs)

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        step = prepare(*args, **kwargs)
        size = int(step.num_scheduled_tokens.sum())
        requests.follow(
            step.req_ids,
            step.num_scheduled_tokens,
            step.num_computed_tokens_np,
            lambda: Step(step.input_ids[:size], step.positions[:size]),
        )
        return step

    def prepare_inputs_v1(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        step, size = runner.input_batch, int(num_scheduled_tokens.sum())
        requests.follow(
            step.req_ids,
            num_scheduled_tokens,
            step.num_computed_tokens_cpu[: step.num_reqs],
            lambda: Step(runner.input_ids.gpu[:size], runner.positions[:size]),
        )
        return prepared

    runner.execute_model = execute_model
    if v2:
        runner.prepare_inputs = prepare_inputs
    else:
        runner._prepare_inputs = prepare_inputs_v1
