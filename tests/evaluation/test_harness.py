from __future__ import annotations

import pytest
import torch

import confsteer
from confsteer import Steering, SteeringError
from confsteer.corpus import make_windows
from confsteer.evaluation.harness import evaluate
from confsteer.evaluation.scores import TokenScores
from tests.models import zipf_texts
from tests.planted import planted


def test_results_are_those_of_running_the_steered_model() -> None:
    model, tokenizer, _, profile = planted("llama")
    texts = zipf_texts(6, 150, seed=9)
    steerings = [Steering(entropy=0.3), Steering(scale={"entropy": 0.0})]
    result = evaluate(model, tokenizer, texts, profile, steerings, window=64)
    assert [r.steering for r in result.results] == [Steering(), *steerings]
    windows = make_windows(texts, tokenizer, window=64)
    for row in result.results:
        scores = []
        for batch in windows.batches(1):
            with torch.no_grad(), confsteer.steer(model, profile, row.steering):
                scores.append(TokenScores.of(model(batch.input_ids, use_cache=False).logits[batch.kept], batch.targets))
        nll, entropy = torch.cat([s.nll for s in scores]), torch.cat([s.entropy for s in scores])
        assert result.tokens == len(nll)
        assert row.metrics["loss"].value == pytest.approx(float(nll.mean()), abs=1e-5)
        assert row.metrics["entropy"].value == pytest.approx(float(entropy.mean()), abs=1e-5)
        assert sum(b.count for b in row.reliability) == result.tokens
        ece = sum(b.count / result.tokens * abs(b.accuracy - b.confidence) for b in row.reliability)
        assert row.metrics["ece"].value == pytest.approx(ece, abs=1e-5)
    assert result.windows == len(windows)


def test_windows_are_taken_as_they_are() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    windows = make_windows(texts, tokenizer, window=64, max_tokens=500, source="zipf")
    assert evaluate(model, tokenizer, windows, profile, []) == evaluate(
        model, tokenizer, texts, profile, [], tokens=500, window=64, source="zipf"
    )


def test_the_entropy_dial_moves_the_entropy_of_unseen_text_as_asked() -> None:
    model, tokenizer, _, profile = planted("llama")
    asked = [-0.4, -0.1, 0.1, 0.4]
    texts = zipf_texts(10, 200, seed=77)
    results = evaluate(model, tokenizer, texts, profile, [Steering(entropy=e) for e in asked], window=64).results
    unsteered = results[0].metrics["entropy"].value
    obtained = [r.metrics["entropy"].value - unsteered for r in results[1:]]
    assert obtained == pytest.approx(asked, rel=0.15)


def test_an_evaluation_survives_json() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    result = evaluate(model, tokenizer, texts, profile, [Steering(clamp={5: (0.0, None)})], tokens=500, window=64)
    assert type(result).model_validate_json(result.model_dump_json()) == result


def test_a_steering_out_of_reach_is_refused_and_the_model_restored() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    with pytest.raises(SteeringError, match="out of reach"):
        evaluate(model, tokenizer, texts, profile, [Steering(entropy=50.0)], tokens=500, window=64)
    assert not any(module._forward_pre_hooks for module in model.modules())
