"""Continuations of one prompt under several steerings, with the same seed for each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer import defaults
from confsteer.errors import CorpusError
from confsteer.profile.profile import Profile
from confsteer.runtimes.transformers import steer
from confsteer.steering import Steering
from confsteer.text.windows import check_ids, prompt_ids


class Generation(NamedTuple):
    """A continuation of a prompt."""

    steering: Steering
    """Steering that it was generated with, as it was asked for."""
    text: str
    """Text of the continuation alone, without special tokens."""
    entropy: float
    """Mean entropy of the predictions of its tokens, in nats, before any sampling temperature."""
    n_tokens: int
    """Number of generated tokens, special ones included."""


def generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    prompt: str | Sequence[int],
    steerings: Sequence[Steering],
    *,
    max_new_tokens: int = defaults.MAX_NEW_TOKENS,
    temperature: float = defaults.TEMPERATURE,
    seed: int = defaults.SEED,
) -> list[Generation]:
    """Continue a prompt with each of several steerings.

    Args:
        model: the profile's model. It is steered in place, and restored.
        tokenizer: its tokenizer.
        profile: see `confsteer.steer`.
        prompt: token ids, or a text that `confsteer.text.windows.prompt_ids` reads.
        steerings: steerings, with one continuation each. `Steering()` is the unsteered model.
        max_new_tokens: most tokens of a continuation, 1 or more.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of torch's random numbers, set before each continuation.

    Returns:
        The continuations, in the order of `steerings`.

    Raises:
        CorpusError: the prompt has no tokens, or unknown ones, or see `confsteer.text.windows.prompt_ids`.
        SteeringError, NoNeuronsError, ProfileMismatchError: see `confsteer.steer`.
    """
    given = prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else prompt
    ids = torch.tensor([given], dtype=torch.int64, device=model.device)
    length = ids.shape[1]
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if length == 0:
        raise CorpusError("the prompt has no tokens: there is nothing to continue")
    check_ids(ids, profile.model.vocab_size)

    def generation(steering: Steering) -> Generation:
        torch.manual_seed(seed)
        generate: Any = model.generate
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **sampling,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        log_p = torch.stack(output.logits).float().log_softmax(-1)
        entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
        text = str(tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True))
        return Generation(steering, text, entropy, len(output.logits))

    found = []
    # Stay in a context while the positions are the same: each entry checks the whole model.
    for _, alike in itertools.groupby(steerings, lambda steering: profile.resolve(steering).positions):
        group = [*alike]
        with steer(model, profile, group[0], tokenizer=tokenizer) as steerer:
            for steering in group:
                steerer.update(steering)
                found.append(generation(steering))
    return found
