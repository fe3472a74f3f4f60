"""Continuations of many prompts under each of several steerings, greedy and sampled, in batches.

Steering acts after the last layer's keys and values. So a prompt runs once, and all of its continuations start from its cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from confsteer.defaults import SEED
from confsteer.errors import CorpusError
from confsteer.model.locate import input_device
from confsteer.profile.profile import Profile
from confsteer.runtimes.passes import replaced
from confsteer.runtimes.transformers import steer
from confsteer.steering import Steering
from confsteer.text.windows import check_ids

BATCH_ROWS, BATCH_TOKENS = 64, 4096
"""Most continuations at a time, and most tokens of their prompts. All continuations of a prompt are in one batch."""


class Ends(NamedTuple):
    """Limits of a continuation."""

    max_new_tokens: int
    until: tuple[str, ...] = ()
    """Strings that end it, unless they are in the white space at its beginning. A token that ends texts ends it too."""


class Written(NamedTuple):
    """The greedy continuation of a prompt, and samples of others."""

    text: str
    """Text without the string or token that ended it, special tokens, and white space around it."""
    log_probability: Tensor
    """Log-probability of each of its tokens, the one that ended it included, ``[temperatures, tokens]``."""
    ended: bool
    """Whether it ended before it was cut off."""
    samples: tuple[str, ...]
    """Continuations sampled at temperature 1."""


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    prompts: Sequence[tuple[Sequence[int], Ends]],
    steerings: Sequence[Steering],
    *,
    samples: int = 0,
    temperatures: Sequence[float] = (1.0,),
    on_prompts: Callable[[int], object] = lambda prompts: None,
) -> list[list[Written]]:
    """Continue prompts under each of several steerings.

    Probabilities and samples are those of the steered model itself. Its own generation settings (a temperature, top-k, a
    penalty) do not apply. Random numbers are seeded once for all prompts, and torch's own state is left alone.

    Args:
        model: the profile's model, in evaluation mode. It is steered in place, and restored.
        tokenizer: its tokenizer.
        profile: see `confsteer.steer`.
        prompts: token ids, one or more, and the limits of the continuation.
        steerings: the steerings. `Steering()` is the unsteered model.
        samples: number of samples beside each greedy continuation.
        temperatures: temperatures at which the greedy continuation's tokens are scored.
        on_prompts: function called with the number of prompts that were continued.

    Returns:
        Continuations of each prompt, in the order of `steerings`.

    Raises:
        CorpusError: a prompt has no tokens, or some that the model does not know.
        SteeringError, NoNeuronsError, ProfileMismatchError: see `confsteer.steer`.
    """
    found: list[list[Written]] = [[] for _ in prompts]
    if not all(len(ids) for ids, _ in prompts):
        raise CorpusError("a prompt has no tokens: there is nothing to continue")
    configuration = _plain_sampling(model, tokenizer)
    with _seeded(input_device(model)), replaced(model, "generation_config", configuration):
        for batch in _batches([len(ids) for ids, _ in prompts], len(steerings) * (1 + samples)):
            some = [prompts[i] for i in batch]
            written = _continue(model, tokenizer, profile, some, steerings, samples, temperatures)
            for i, of_prompt in zip(batch, written, strict=True):
                found[i] = of_prompt
            on_prompts(len(batch))
    return found


def _batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Group prompts of similar length. `rows` is the number of continuations of each."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Count padding: lengths rise, so all of the batch are padded to this one.
        if batch and ((len(batch) + 1) * rows > BATCH_ROWS or (len(batch) + 1) * lengths[i] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _plain_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Make generation settings with the model's tokens that end a text, and none of its other settings."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    end_ids = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    padding = next((i for i in (tokenizer.pad_token_id, *end_ids) if i is not None), 0)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(**settings, eos_token_id=end_ids or None, pad_token_id=padding)


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed random numbers within the context, and leave torch's own state as it was."""
    on = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(on, device_type=device.type if on else "cuda"):
        torch.manual_seed(SEED)
        yield


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    prompts: Sequence[tuple[Sequence[int], Ends]],
    steerings: Sequence[Steering],
    samples: int,
    temperatures: Sequence[float],
) -> list[list[Written]]:
    """Continue a batch. Rows are ordered by steering, then by prompt, with the greedy one before the samples."""
    device, each = input_device(model), 1 + samples
    lengths = torch.tensor([len(ids) for ids, _ in prompts])
    longest = int(lengths.max())
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long().to(device)
    ids = torch.tensor([[0] * (longest - len(ids)) + [*ids] for ids, _ in prompts], device=device)
    check_ids(ids, profile.model.vocab_size)
    cache = _read(model, ids[:, :-1], mask[:, :-1])
    row = torch.arange(len(prompts), device=device).repeat_interleave(each).repeat(len(steerings))
    if cache is not None:
        cache.reorder_cache(row)
    greedy = _Greedy(each, temperatures)
    stops = _Stops(tokenizer, longest, [prompts[i][1] for i in row.tolist()], model.generation_config.eos_token_id or [])
    generate: Any = model.generate
    with steer(model, profile, [*steerings]):
        output = generate(
            ids[row],
            attention_mask=mask[row],
            past_key_values=cache,
            max_new_tokens=max(ends.max_new_tokens for _, ends in prompts),
            logits_processor=LogitsProcessorList([greedy]),
            stopping_criteria=StoppingCriteriaList([stops]),
        )
    texts = stops.texts(output)
    log_probability = greedy.of_tokens()
    found: list[list[Written]] = [[] for _ in prompts]
    for number, first in enumerate(range(0, len(row), each)):
        own = log_probability[number, :, : int(stops.length[first])]
        found[int(row[first])].append(
            Written(texts[first], own.cpu(), bool(stops.ended[first]), tuple(texts[first + 1 : first + each]))
        )
    return found


def _read(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Any:
    """Run the body over the beginning of prompts, padded on the left. Return its cache; None if there is no beginning."""
    if ids.shape[1] == 0:
        return None
    # Give positions only to models that take them: others read distances from the mask.
    knows = "position_ids" in inspect.signature(model.base_model.forward).parameters
    positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)} if knows else {}
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=True, **positions).past_key_values


class _Greedy(LogitsProcessor):
    """Processor that makes the first row of each group greedy, and notes the values behind its log-probabilities."""

    def __init__(self, each: int, temperatures: Sequence[float]) -> None:
        self._each, self._temperatures = each, temperatures
        self._noted: list[tuple[Tensor, Tensor]] = []
        """Largest logit of each step ``[groups]``, and its log-sums at the temperatures, ``[groups, temperatures]``."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = scores[:: self._each].float()
        top, token = first.max(dim=-1)
        log_sums = torch.stack([(first / t).logsumexp(dim=-1) for t in self._temperatures], dim=-1)
        self._noted.append((top, log_sums))
        forced = torch.full_like(first, -torch.inf).scatter_(1, token[:, None], 0.0)
        scores = scores.clone()
        scores[:: self._each] = forced.to(scores.dtype)
        return scores

    def of_tokens(self) -> Tensor:
        """Compute log-probabilities, float32 ``[groups, temperatures, steps]``."""
        temperature = torch.tensor(self._temperatures, device=self._noted[0][0].device)
        return torch.stack([top[:, None] / temperature - log_sums for top, log_sums in self._noted], dim=-1)


class _Stops(StoppingCriteria):
    """Criteria that note the end of each row: a token that ends texts, a string of its own, or its limit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, ends: Sequence[Ends], end_ids: Sequence[int]) -> None:
        self._tokenizer, self._start, self._ends, self._end_ids = tokenizer, start, ends, torch.tensor([*end_ids])
        self.length = torch.zeros(len(ends), dtype=torch.long)
        """Number of tokens of each row, the one that ended it included."""
        self.ended = torch.zeros(len(ends), dtype=torch.bool)
        self._full = torch.zeros(len(ends), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written = input_ids[:, self._start :].cpu()
        going = (~(self.ended | self._full)).nonzero()[:, 0]
        self.length[going] = written.shape[1]
        self.ended[going] = torch.isin(written[going, -1], self._end_ids)
        for i in going.tolist():
            if ends := self._ends[i].until:
                text = self._decode(written[i])
                self.ended[i] |= any(end in text for end in ends)
            self._full[i] = written.shape[1] >= self._ends[i].max_new_tokens
        return (self.ended | self._full).to(input_ids.device)

    def texts(self, output: Tensor) -> list[str]:
        """Decode each row up to its end."""
        written, found = output[:, self._start :].cpu(), []
        for row, length, ends in zip(written, self.length.tolist(), self._ends, strict=True):
            text = self._decode(row[:length])
            for end in ends.until:
                text = text.partition(end)[0]
            found.append(text.strip())
        return found

    def _decode(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).lstrip()
