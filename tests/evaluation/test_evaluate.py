from __future__ import annotations

import pytest
import torch

import confsteer
from confsteer import CorpusError, Steering, SteeringError
from confsteer.evaluation.evaluate import evaluate, sweep
from confsteer.last_layer.scores import TokenScores
from confsteer.text.windows import make_windows
from tests.models import zipf_texts
from tests.planted import output_weights, planted


def test_results_are_those_of_running_the_steered_model() -> None:
    model, tokenizer, _, profile = planted("llama")
    texts = zipf_texts(6, 150, seed=9)
    steerings = [Steering(entropy=0.3), Steering(scale={"entropy": 0.0})]
    (result,) = evaluate(model, tokenizer, texts, profile, steerings, window=64).texts
    assert [row.steering for row in result.of_kind("steering")] == steerings
    windows = make_windows(texts, tokenizer, window=64)
    for row in (*result.of_kind("neutral"), *result.of_kind("steering")):
        scores = []
        for batch in windows.batches(1):
            with torch.no_grad(), confsteer.steer(model, profile, row.steering):
                scores.append(TokenScores.of(model(batch.input_ids, use_cache=False).logits[batch.kept], batch.targets))
        joined = TokenScores.join(scores)
        assert result.tokens == len(joined.nll)
        assert row.metrics["loss"].value == pytest.approx(float(joined.nll.mean()), abs=1e-4)
        assert row.metrics["entropy"].value == pytest.approx(float(joined.entropy.mean()), abs=1e-4)
        assert sum(b.count for b in row.reliability) == result.tokens
        ece = sum(b.count / result.tokens * abs(b.accuracy.value - b.confidence) for b in row.reliability)
        assert row.metrics["ece"].value == pytest.approx(ece, abs=1e-5)
        assert sum(row.entropies) == pytest.approx(1)
        assert row.coverage[-1] == pytest.approx(row.metrics["accuracy"].value)
        assert sum(group.count for group in row.frequency) == result.tokens
        loss = sum(group.count * group.loss for group in row.frequency) / result.tokens
        assert loss == pytest.approx(row.metrics["loss"].value, abs=1e-5)
    assert (result.windows, result.blocks, result.unit) == (len(windows), len(windows), "windows")


def test_each_steering_stands_beside_the_temperature_of_the_same_entropy() -> None:
    model, tokenizer, _, profile = planted("llama")
    steerings = [Steering(entropy=0.3), Steering(entropy=-0.2)]
    (result,) = evaluate(model, tokenizer, zipf_texts(6, 150, seed=9), profile, steerings, window=64).texts
    for steered, matched in zip(result.of_kind("steering"), result.of_kind("matched temperature"), strict=True):
        assert matched.steering == steered.steering
        assert matched.metrics["entropy"].value == pytest.approx(steered.metrics["entropy"].value, abs=1e-3)
        assert matched.metrics["argmax_changed"].value == 0
        difference = steered.minus["matched temperature"]["loss"].value
        assert difference == pytest.approx(steered.metrics["loss"].value - matched.metrics["loss"].value, abs=1e-6)
    hot, cold = result.of_kind("matched temperature")
    assert hot.values[0] > 1 > cold.values[0]


def test_baselines_are_judged_on_what_they_were_not_fitted_to() -> None:
    """The two halves are fitted apart: swapping the text of one half moves only the fit that the other half is judged by."""
    model, tokenizer, _, profile = planted("llama")
    even, odd, other = (output_weights(Steering(), seed=seed, documents=20) for seed in range(3))

    def temperatures(second: list[str]) -> tuple[float, ...]:
        texts = [text for pair in zip(even, second, strict=True) for text in pair]
        (result,) = evaluate(model, tokenizer, texts, profile, [], window=64).texts
        assert (result.blocks, result.unit) == (40, "documents")
        return result.of_kind("temperature")[0].values

    (first, second), (changed, same) = temperatures(odd), temperatures(other)
    assert second == pytest.approx(same, abs=1e-4)
    assert first != pytest.approx(changed, abs=1e-4)


def test_several_texts_and_windows_as_they_are() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    windows = make_windows(texts, tokenizer, window=64, max_tokens=500, source="one")
    result = evaluate(model, tokenizer, {"one": texts, "other": texts[5:]}, profile, [], tokens=500, window=64)
    assert [text.source for text in result.texts] == ["one", "other"]
    assert evaluate(model, tokenizer, windows, profile, []).texts == result.texts[:1]


def test_the_entropy_dial_moves_the_entropy_of_unseen_text_as_asked() -> None:
    model, tokenizer, _, profile = planted("llama")
    asked = [-0.4, -0.1, 0.1, 0.4]
    texts = zipf_texts(10, 200, seed=77)
    (result,) = evaluate(model, tokenizer, texts, profile, [Steering(entropy=e) for e in asked], window=64).texts
    unsteered = result.rows[0].metrics["entropy"].value
    obtained = [row.metrics["entropy"].value - unsteered for row in result.of_kind("steering")]
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


def test_what_steers_only_generated_positions_is_refused() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    with_preset = profile.with_preset("later", Steering(entropy=0.2, positions="generated"))
    for steering in (Steering(entropy=0.2, positions="generated"), Steering(preset="later"), Steering.parse("positions=first:9")):
        with pytest.raises(SteeringError, match="every position"):
            evaluate(model, tokenizer, texts, with_preset, [steering], tokens=500, window=64)


def test_a_single_window_is_too_little() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    with pytest.raises(CorpusError, match="single window"):
        evaluate(model, tokenizer, texts, profile, [], tokens=50, window=64)


def test_a_preset_is_written_out() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    with_preset = profile.with_preset("calm", Steering(entropy=0.2))
    (result,) = evaluate(model, tokenizer, texts, with_preset, [Steering(preset="calm")], tokens=500, window=64).texts
    (row,) = result.of_kind("steering")
    assert (row.name, row.steering) == ("preset=calm", Steering(entropy=0.2))


def test_sweeps() -> None:
    assert [one.entropy for one in sweep("entropy=-0.4:1.2:9")] == pytest.approx([-0.4 + 0.2 * i for i in range(9)])
    assert [one.scale for one in sweep("scale.entropy=0:2:3")] == [{"entropy": 0.0}, {"entropy": 1.0}, {"entropy": 2.0}]
    for wrong in ("entropy", "entropy=1", "entropy=1:2", "entropy=a:b:3", "entropy=0:1:2.5"):
        with pytest.raises(SteeringError, match="KEY=FIRST:LAST:NUMBER"):
            sweep(wrong)
    with pytest.raises(SteeringError, match="use 2 to 100"):
        sweep("entropy=0:1:1000")
    with pytest.raises(SteeringError, match="unknown key"):
        sweep("entrpy=0:1:3")
