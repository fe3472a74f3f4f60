from __future__ import annotations

import pytest
import torch

import confsteer
from confsteer import CorpusError, Steering, SteeringError
from confsteer.runtimes.generations import generations
from tests.planted import planted


def test_each_is_what_the_steered_model_generates_with_the_seed() -> None:
    model, tokenizer, _, profile = planted("llama")
    steerings = [Steering(), Steering(entropy=0.5), Steering(scale={"entropy": 0.0})]
    found = generations(model, tokenizer, profile, "t3 t5", steerings, max_new_tokens=12, temperature=0.7, seed=3)
    assert [one.steering for one in found] == steerings
    inputs = tokenizer("t3 t5", return_tensors="pt")
    for one in found:
        torch.manual_seed(3)
        with torch.no_grad(), confsteer.steer(model, profile, one.steering):
            ids = model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=12)
            logits = model(ids, use_cache=False).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
        assert one.text == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert one.entropy == pytest.approx(float(torch.special.entr(logits.softmax(-1)).sum(-1).mean()), abs=1e-4)


def test_temperature_zero_is_greedy() -> None:
    model, tokenizer, _, profile = planted("llama")
    (one, other) = (generations(model, tokenizer, profile, "t3", [Steering()], temperature=0, seed=seed) for seed in (0, 1))
    assert one == other


def test_the_model_is_restored_whatever_goes_wrong() -> None:
    model, tokenizer, _, profile = planted("llama")
    with pytest.raises(CorpusError, match="no tokens"):
        generations(model, tokenizer, profile, "", [Steering()])
    with pytest.raises(SteeringError, match="out of reach"):
        generations(model, tokenizer, profile, "t3", [Steering(entropy=50.0)])
    assert not any(module._forward_pre_hooks for module in model.modules())
