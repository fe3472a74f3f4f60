"""Random models, batches and ways to generate, against a loop that edits the activations by hand.

``FUZZ_CASES=2000 pytest tests/runtimes/test_generation_fuzz.py`` runs more of them.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import confsteer
from confsteer import Profile, Steering
from confsteer.model.dissect import dissect
from tests.models import FAMILIES, VOCAB, tiny_model
from tests.planted import planted

NEURONS = (5, 11, 20)
"""Those of the planted model's profile, which is made to fit every model here."""
TOLERANCE = 1e-5
"""Largest difference of a logit, or of a beam's score, in nats. Logits here are up to 20, which float32 rounds to 1e-6."""


@functools.cache
def model_and_profile(number: int) -> tuple[Any, Profile]:
    """A tiny model of each family, which keeps no end-of-text token, so that every row has the length asked for."""
    model = tiny_model(*FAMILIES[number], seed=number)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    profile = planted("gpt2").profile
    anatomy = dissect(model)
    identity = profile.model.model_copy(update={"n_neurons": anatomy.n_neurons, "fingerprints": anatomy.fingerprints()})
    return model, profile.model_copy(update={"model": identity})


class Case(NamedTuple):
    """A batch of prompts, steerings of its rows, and how to go on."""

    family: int
    lengths: list[int]
    steerings: list[Steering]
    positions: Any
    """``after`` with where in the text, generated without steering, the marker begins, and how long it is."""
    how: dict[str, Any]
    seed: int


finite = functools.partial(st.floats, width=32, allow_nan=False)
one_steering = st.builds(
    lambda scale, clamp: {"scale": scale, "clamp": clamp},
    st.dictionaries(st.sampled_from(NEURONS[:2]), finite(-4, 4), max_size=2),
    st.dictionaries(st.just(NEURONS[2]), finite(-8, 8), max_size=1),
)
ways: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.just({"use_cache": False}),
    st.builds(lambda t: {"do_sample": True, "temperature": t, "top_k": 0}, finite(0.5, 2)),
    st.builds(lambda n: {"num_beams": n, "num_return_sequences": n}, st.integers(2, 3)),
    st.builds(lambda n: {"prompt_lookup_num_tokens": n}, st.integers(1, 4)),
    st.builds(lambda n: {"prefill_chunk_size": n}, st.integers(1, 4)),
    st.just({"cache_implementation": "static"}),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case that transformers can run: drafts are for one row, and so are chunks of a prompt."""
    how = draw(ways)
    alone = "prompt_lookup_num_tokens" in how
    even = "prefill_chunk_size" in how
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=1 if alone else 4))
    if even:
        lengths = [lengths[0]] * len(lengths)
    windows = st.builds(lambda n: {"first": n}, st.integers(1, 6)), st.builds(lambda *at: {"after": at}, *[st.integers(0, 2)] * 2)
    positions = draw(st.one_of(st.sampled_from(["all", "generated"]), *windows))
    rows = draw(st.sampled_from([1, len(lengths)]))
    steerings = [Steering(**draw(one_steering)) for _ in range(rows)]
    return Case(draw(st.integers(0, len(FAMILIES) - 1)), lengths, steerings, positions, how, draw(st.integers(0, 2**16)))


def steered_choices(positions: Any, tokens: list[int]) -> list[bool]:
    """Whether the choice of each of the generated tokens is steered, by the definition."""
    if isinstance(positions, str):
        return [True] * len(tokens)
    if "first" in positions:
        return [number < positions["first"] for number in range(len(tokens))]
    marker = positions["after"]
    return [any(tokens[i : i + len(marker)] == marker for i in range(end + 1 - len(marker))) for end in range(len(tokens))]


def by_hand(model: Any, profile: Profile, prompt: Tensor, tokens: Tensor, steering: Steering, positions: Any = "all") -> Tensor:
    """Logits that chose each of `tokens`, from uncached passes over the text of one row: edited everywhere, and nowhere."""
    if not isinstance(positions, str):
        edited, plain = (by_hand(model, profile, prompt, tokens, one) for one in (steering, Steering()))
        return torch.where(torch.tensor(steered_choices(positions, tokens.tolist()))[:, None], edited, plain)
    index = [neuron.index for neuron in profile.steerable]
    gain, bias, low, high = map(torch.from_numpy, profile.edit(steering))

    def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activations = args[0].clone()
        activations[..., index] = (activations[..., index] * gain + bias).clamp(low, high)
        return (activations, *args[1:])

    handle = dissect(model).down_proj.register_forward_pre_hook(edit)
    try:
        with torch.no_grad():
            text = torch.cat([prompt, tokens])[None]
            logits: Tensor = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
    finally:
        handle.remove()
    return logits[0, len(prompt) - 1 : -1]


@settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "50")),
    derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_generation_is_that_of_the_edit_by_hand(case: Case) -> None:
    """Each token has the logits that the rule gives it, and greedy decoding takes the largest."""
    model, profile = model_and_profile(case.family)
    generator = torch.Generator().manual_seed(case.seed)
    prompts = [torch.randint(1, VOCAB, (length,), generator=generator) for length in case.lengths]
    width = max(case.lengths)
    ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
    how = {"do_sample": False, **case.how, "max_new_tokens": 5, "pad_token_id": 0}

    def generate() -> Any:
        torch.manual_seed(case.seed)
        return model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, output_scores=True, **how
        )

    positions = case.positions
    if "after" in positions:
        begin, length = positions["after"]
        positions = {"after": generate().sequences[-1, width + begin :][: length + 1].tolist()}
    asked = [steering.model_copy(update={"positions": Steering(positions=positions).positions}) for steering in case.steerings]
    with torch.no_grad(), confsteer.steer(model, profile, asked):
        output = generate()
    beams = how.get("num_return_sequences", 1)
    tokens = output.sequences[:, width:]
    assert tokens.shape == (len(prompts) * beams, 5)
    for number, row in enumerate(tokens):
        source = number // beams
        steering = case.steerings[source % len(case.steerings)]
        expected = by_hand(model, profile, prompts[source], row, steering, positions)
        if beams > 1:
            # A beam's rows change places, so its score is compared: a mean of log-probabilities.
            log_p = expected.log_softmax(-1).gather(-1, row[:, None]).sum() / 5
            torch.testing.assert_close(output.sequences_scores[number], log_p, atol=TOLERANCE, rtol=0)
            continue
        logits = torch.stack([step[source] for step in output.logits])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        if not how["do_sample"]:
            assert torch.equal(logits.argmax(-1), row)
