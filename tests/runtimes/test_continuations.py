from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import confsteer
from confsteer import CorpusError, Steering
from confsteer.runtimes.continuations import Ends, Written, write
from tests.planted import planted


@functools.cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 96, (n,), generator=generator).tolist() for n in (1, 3, 9, 20, 2)]


def greedy(model: Any, ids: list[int], steps: int) -> tuple[list[int], Tensor]:
    """One pass over the whole text for each token; log-probabilities at temperatures 1 and 2, ``[2, steps]``."""
    tokens, scores = list(ids), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        scores.append(torch.stack([(logits / t).log_softmax(-1)[tokens[-1]] for t in (1.0, 2.0)]))
    return tokens[len(ids) :], torch.stack(scores, dim=-1)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_a_batch_is_each_prompt_and_steering_by_itself(model_type: str) -> None:
    model, tokenizer, _, profile = planted(model_type)
    steerings = [Steering(), Steering(entropy=0.1), Steering(scale={20: 3.0})]
    found = write(model, tokenizer, profile, [(ids, Ends(5)) for ids in prompts()], steerings, samples=2, temperatures=(1.0, 2.0))
    for ids, row in zip(prompts(), found, strict=True):
        for steering, ours in zip(steerings, row, strict=True):
            with confsteer.steer(model, profile, steering):
                tokens, scores = greedy(model, ids, ours.log_probability.shape[1])
            assert ours.text == str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            assert torch.allclose(ours.log_probability, scores, atol=1e-4)
            assert len(ours.samples) == 2
            assert ours.ended == (tokens[-1] == tokenizer.eos_token_id)


def test_samples_are_drawn_from_the_steered_distribution() -> None:
    model, tokenizer, _, profile = planted("llama")
    steering, number = Steering(entropy=0.3), 4000
    ((ours,),) = write(model, tokenizer, profile, [([5, 6, 7], Ends(1))], [steering], samples=number)
    with confsteer.steer(model, profile, steering), torch.no_grad():
        p = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([tokenizer(text)["input_ids"][0] if text else 0 for text in ours.samples]), minlength=96)
    spread = (number * p * (1 - p)).sqrt()
    assert bool(((counts - number * p).abs() <= 5 * spread + 1).all())


def test_draws_repeat_and_leave_the_random_state_alone() -> None:
    model, tokenizer, _, profile = planted("gpt2")
    before, own = torch.get_rng_state(), model.generation_config

    def draw() -> list[list[Written]]:
        return write(model, tokenizer, profile, [(ids, Ends(4)) for ids in prompts()], [Steering()], samples=3)

    first = [one.samples for (one,) in draw()]
    torch.rand(7)
    assert [one.samples for (one,) in draw()] == first
    assert len({sample for samples in first for sample in samples}) > 5
    torch.set_rng_state(before)
    draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config is own


def test_nothing_that_comes_with_the_model_for_generation_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _, profile = planted("llama")
    asked = [(prompts()[2], Ends(6))]
    ((plain,),) = write(model, tokenizer, profile, asked, [Steering()])
    for name, value in {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_new_tokens": 1}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    ((ours,),) = write(model, tokenizer, profile, asked, [Steering()])
    assert ours.text == plain.text
    assert torch.equal(ours.log_probability, plain.log_probability)


def test_a_continuation_ends_with_a_string_of_its_own_or_when_it_is_full() -> None:
    model, tokenizer, _, profile = planted("llama")
    ids = prompts()[2]
    tokens, _ = greedy(model, ids, 6)
    stop = f"t{tokens[2]}"
    whole = [f"t{token}" for token in tokens]
    found = write(model, tokenizer, profile, [(ids, Ends(6, (stop,))), (ids, Ends(2)), (ids, Ends(6))], [Steering()])
    (stopped,), (full,), (free,) = found
    first = whole.index(stop) + 1
    # A word that begins alike ends it too: the string is looked for in the text.
    assert " ".join(whole).startswith(stopped.text)
    assert stop not in stopped.text
    assert stopped.ended
    assert stopped.log_probability.shape[1] <= first
    assert (full.text, full.ended, full.log_probability.shape) == (" ".join(whole[:2]), False, (1, 2))
    assert free.text == " ".join(whole)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    model, tokenizer, _, profile = planted("llama")
    with pytest.raises(CorpusError, match="a prompt has no tokens"):
        write(model, tokenizer, profile, [([5], Ends(1)), ([], Ends(1))], [Steering()])
    with pytest.raises(CorpusError):
        write(model, tokenizer, profile, [([96], Ends(1))], [Steering()])
    assert write(model, tokenizer, profile, [], [Steering()]) == []
