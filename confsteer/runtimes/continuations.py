"""Continuations of many prompts under each of several steerings, greedy and sampled, in batches.

Steering acts after the last layer's keys and values. So a prompt runs once, and all of its continuations go on from there.
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
"""Continuations that are written at a time, and tokens of their prompts, at most; a prompt with its continuations is not cut."""


class Ends(NamedTuple):
    """Where a continuation ends at the latest."""

    max_new_tokens: int
    until: tuple[str, ...] = ()
    """Strings that end it, white space at its beginning left out; a token that ends texts does as well."""


class Written(NamedTuple):
    """The greedy continuation of a prompt, and samples of others."""

    text: str
    """Without what ended it, special tokens and white space around it."""
    log_probability: Tensor
    """Log-probability of each of its tokens at each temperature, that which ended it among them, ``[temperatures, tokens]``."""
    ended: bool
    """Whether it came to an end before it was cut off."""
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

    Probabilities and samples are of the steered model itself: nothing that comes with it for generation (a temperature, top-k,
    a penalty) applies. Random numbers are seeded once for all prompts, and torch's own state is left as it was.

    Args:
        model: the profile's model, in evaluation mode; it is steered in place, and restored.
        tokenizer: its tokenizer.
        profile: see `confsteer.steer`.
        prompts: token ids, one or more, and where the continuation ends.
        steerings: `Steering()` is the unsteered model.
        samples: how many to draw beside each greedy continuation.
        temperatures: at which the greedy continuation's tokens are scored.
        on_prompts: called with a number of prompts after these were continued.

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
    """Group prompts of like length; `rows` is how many continuations each has."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Lengths rise: this one is what all of the batch are padded to.
        if batch and ((len(batch) + 1) * rows > BATCH_ROWS or (len(batch) + 1) * lengths[i] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _plain_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Make settings that know the tokens that end a text, and nothing else of the model's own."""
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
    """Continue a batch. Its rows are by steering, then by prompt; then the greedy one comes before the samples."""
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
    """Run the body over the beginning of prompts, padded on the left; its cache, None where there is no beginning."""
    if ids.shape[1] == 0:
        return None
    # Models that take no positions have none of their own, and read distances off the mask.
    knows = "position_ids" in inspect.signature(model.base_model.forward).parameters
    positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)} if knows else {}
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=True, **positions).past_key_values


class _Greedy(LogitsProcessor):
    """Lets the first of each group of rows take the likeliest token, and notes what its log-probabilities follow from."""

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
    """Notes where each row ends: at a token that ends texts, with a string of its own, or when it is full."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, ends: Sequence[Ends], end_ids: Sequence[int]) -> None:
        self._tokenizer, self._start, self._ends, self._end_ids = tokenizer, start, ends, torch.tensor([*end_ids])
        self.length = torch.zeros(len(ends), dtype=torch.long)
        """Tokens of each row, with that which ended it."""
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
