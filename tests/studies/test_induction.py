from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import confsteer
from confsteer import CorpusError, NoNeuronsError, Profile, SettingError, demo
from confsteer.last_layer.scores import TokenScores
from confsteer.studies.induction import InductionStudy, RepeatedSequences, induction
from confsteer.studies.repetition import Repetition, natural_cut, natural_stretches, random_stretches
from confsteer.text.windows import make_windows
from tests.models import ENTROPY_NEURONS, FAMILIES, VOCAB, chat_tokenizer, tiny_model, tiny_tokenizer, zipf_texts
from tests.planted import planted

HALF, SEQUENCES = 24, 6
PAIRED = HALF - 4  # without the first three positions and the last, each paired with its second reading


def study(model_type: str, **settings: Any) -> InductionStudy:
    model, tokenizer, texts, profile = planted(model_type)
    repeat = Repetition(SEQUENCES, HALF, settings.pop("seed", 0))
    window, tokens = natural_cut(tokenizer, repeat)
    text = make_windows(texts, tokenizer, window=window, max_tokens=tokens)
    return induction(model, tokenizer, profile, text=text, repeat=repeat, **settings)


def sequences_of(kind: RepeatedSequences, seed: int = 0) -> torch.Tensor:
    _, tokenizer, texts, _ = planted("llama")
    if kind.kind == "random":
        stretches = random_stretches(tokenizer, VOCAB, SEQUENCES, HALF, seed=seed)
    else:
        stretches = natural_stretches(make_windows(texts, tokenizer, window=HALF), SEQUENCES, HALF)
    return torch.from_numpy(stretches).long().repeat(1, 2)


def run_model(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and loss of every prediction that has a next token, ``[sequences, positions]``."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    scores = TokenScores.of(logits.flatten(0, 1), ids[:, 1:].flatten())
    return scores.entropy.view(len(ids), -1), scores.nll.view(len(ids), -1)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_it_is_what_the_model_does_when_it_is_steered(model_type: str) -> None:
    """Means, the bounds of the clips and every clip, against `confsteer.steer` with a clamp and a hook of our own."""
    model, _, _, profile = planted(model_type)
    projection = {
        "gpt2": lambda: model.transformer.h[-1].mlp.c_proj,
        "llama": lambda: model.model.layers[-1].mlp.down_proj,
    }[model_type]()
    result = study(model_type)
    assert [kind.kind for kind in result.kinds] == ["random", "natural"]
    for kind in result.kinds:
        ids = sequences_of(kind)
        assert kind.positions == tuple(range(3, 2 * HALF - 1))
        assert kind.repeats_from == HALF
        seen: list[torch.Tensor] = []
        handle = projection.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].clone()))
        entropy, loss = run_model(model, ids)
        handle.remove()
        assert kind.entropy.mean == pytest.approx(entropy[:, 3:].mean(0).tolist(), abs=1e-4)
        assert kind.loss.mean == pytest.approx(loss[:, 3:].mean(0).tolist(), abs=1e-4)
        errors = entropy[:, 3:].std(0) / math.sqrt(SEQUENCES)
        assert kind.entropy.standard_error == pytest.approx(errors.tolist(), abs=1e-4)
        first, second = slice(3, 3 + PAIRED), slice(3 + HALF, 3 + HALF + PAIRED)
        for reading, where in ((kind.first, first), (kind.second, second)):
            assert reading.entropy.value == pytest.approx(float(entropy[:, where].mean()), abs=1e-4)
            assert reading.loss.value == pytest.approx(float(loss[:, where].mean()), abs=1e-4)
        clamp: dict[int, tuple[float | None, float | None]] = {}
        for neuron in kind.neurons:
            a = seen[0][:, :, neuron.index]
            means = float(a[:, first].mean()), float(a[:, second].mean())
            assert (neuron.first_mean, neuron.second_mean) == pytest.approx(means, abs=1e-5)
            assert neuron.clipped_from == ("above" if means[1] > means[0] else "below")
            clamp[neuron.index] = (None, means[0]) if means[1] > means[0] else (means[0], None)
        assert [clip.neurons for clip in kind.clips] == [*((index,) for index in clamp), tuple(clamp)]
        for clip in kind.clips:
            with confsteer.steer(model, profile, clamp={index: clamp[index] for index in clip.neurons}):
                clipped_entropy, clipped_loss = run_model(model, ids)
            assert clip.entropy.mean == pytest.approx(clipped_entropy[:, 3:].mean(0).tolist(), abs=1e-4)
            assert clip.loss.mean == pytest.approx(clipped_loss[:, 3:].mean(0).tolist(), abs=1e-4)
            for change, before, after in (
                (clip.first_entropy, entropy[:, first], clipped_entropy[:, first]),
                (clip.second_entropy, entropy[:, second], clipped_entropy[:, second]),
                (clip.first_loss, loss[:, first], clipped_loss[:, first]),
                (clip.second_loss, loss[:, second], clipped_loss[:, second]),
            ):
                assert change.nats.value == pytest.approx(float((after - before).mean()), abs=1e-4)
                assert change.relative.value == pytest.approx(float((after - before).mean() / before.mean()), abs=1e-4)
                assert change.nats.low <= change.nats.value <= change.nats.high


def test_a_clip_that_never_binds_changes_nothing() -> None:
    """A neuron that is always at zero has its mean there; clipping it is bit for bit no clip."""
    model, tokenizer, _, profile = planted("llama")
    gate = model.model.layers[-1].mlp.gate_proj.weight
    kept = gate[30].clone()
    try:
        with torch.no_grad():
            gate[30] = 0
        result = induction(model, tokenizer, profile, repeat=Repetition(SEQUENCES, HALF), neurons=[30])
    finally:
        with torch.no_grad():
            gate[30] = kept
    (kind,) = result.kinds
    (clip,) = kind.clips
    assert clip.entropy == kind.entropy
    assert clip.loss == kind.loss
    assert clip.second_entropy.nats == (0, 0, 0)


def test_neurons_may_be_named() -> None:
    result = study("llama", neurons=[20, 7])
    assert [clip.neurons for clip in result.kinds[0].clips] == [(20,), (7,), (20, 7)]
    with pytest.raises(SettingError, match=r"neurons \[64\]: give some from 0 to 63"):
        study("llama", neurons=[64])


def test_a_bos_comes_first_where_the_tokenizer_puts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _, profile = planted("llama")
    monkeypatch.setattr("confsteer.studies.repetition.leading_ids", lambda tokenizer: [0])
    (kind,) = induction(model, tokenizer, profile, repeat=Repetition(SEQUENCES, HALF)).kinds
    ids = torch.from_numpy(random_stretches(tokenizer, VOCAB, SEQUENCES, HALF)).long()
    entropy, _ = run_model(model, torch.cat([torch.zeros(SEQUENCES, 1, dtype=torch.long), ids, ids], dim=1))
    assert kind.repeats_from == 1 + HALF
    assert kind.entropy.mean == pytest.approx(entropy[:, 3:].mean(0).tolist(), abs=1e-4)


def test_random_stretches_are_uniform_and_without_special_tokens() -> None:
    drawn = random_stretches(tiny_tokenizer(), VOCAB, 500, 20)
    assert drawn.shape == (500, 20)
    counts = np.bincount(drawn.ravel(), minlength=VOCAB)
    assert counts[0] == 0
    assert counts[1:].min() > 50
    assert (drawn == random_stretches(tiny_tokenizer(), VOCAB, 500, 20)).all()
    assert (drawn != random_stretches(tiny_tokenizer(), VOCAB, 500, 20, seed=1)).any()
    assert random_stretches(tiny_tokenizer(), 10, 50, 20).max() == 9


def test_chat_markers_are_no_random_tokens() -> None:
    """Their positions would be left out, and the sequences differ in length."""
    tokenizer = chat_tokenizer()
    assert not {94, 95} & set(tokenizer.all_special_ids)
    assert set(np.unique(random_stretches(tokenizer, VOCAB, 500, 20))) == set(range(1, 94))
    model, _, _, profile = planted("llama")
    (kind,) = induction(model, tokenizer, profile, repeat=Repetition(SEQUENCES, HALF)).kinds
    assert kind.sequences == SEQUENCES


def test_natural_stretches_follow_one_another_and_skip_special_tokens() -> None:
    def words(first: int, last: int) -> str:
        return " ".join(f"t{i}" for i in range(first, last))

    windows = make_windows([words(1, 20), words(20, 24) + " <eos> " + words(25, 32), words(32, 39)], tiny_tokenizer(), window=8)
    assert natural_stretches(windows, 9, 8).tolist() == [list(range(1, 9)), list(range(9, 17))]
    assert natural_stretches(make_windows([words(1, 40)], tiny_tokenizer(), window=8), 2, 7)[:, 0].tolist() == [2, 10]
    with pytest.raises(CorpusError, match="1 stretches of 16 tokens, too few"):
        natural_stretches(make_windows([words(1, 20)], tiny_tokenizer(), window=16), 9, 16)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"half": 7}, "stretches of 7 tokens read twice: use 8 to 32"),
        ({"half": 33}, "stretches of 33 tokens read twice: use 8 to 32"),
        ({"sequences": 1}, "1 sequences give no interval: use at least 2"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], sentence: str) -> None:
    model, tokenizer, _, profile = planted("llama")
    with pytest.raises(SettingError, match=sentence):
        induction(model, tokenizer, profile, repeat=Repetition(SEQUENCES, HALF)._replace(**settings))


def test_a_model_without_entropy_neurons_is_refused_with_the_sentence(empty: tuple[Any, Profile]) -> None:
    model, profile = empty
    with pytest.raises(NoNeuronsError, match="no entropy neurons"):
        induction(model, tiny_tokenizer(), profile, repeat=Repetition(SEQUENCES, HALF))


@pytest.fixture(scope="module")
def empty() -> tuple[Any, Profile]:
    model = tiny_model(*next(f for f in FAMILIES if f.model_type == "llama"))
    return model, confsteer.calibrate(model, tiny_tokenizer(), zipf_texts(), window=64)


def test_a_study_survives_json() -> None:
    result = study("gpt2")
    assert [neuron.index for neuron in result.kinds[0].neurons] != []
    assert {neuron.index for neuron in result.kinds[0].neurons} == set(ENTROPY_NEURONS)
    assert InductionStudy.model_validate_json(result.model_dump_json()) == result


def test_the_bundled_model_knows_what_it_reads_again_and_its_neurons_take_part() -> None:
    """Random tokens cost it over 5 nats less at the second reading; without its entropy neurons it would be less sure."""
    model, tokenizer, profile = demo.load()
    (kind,) = induction(model, tokenizer, profile, repeat=Repetition(4)).kinds
    assert kind.first.loss.low - kind.second.loss.high > 5
    assert kind.first.entropy.low - kind.second.entropy.high > 3
    together = kind.clips[-1]
    assert together.second_entropy.nats.low > 1
    assert together.first_entropy.nats.high < 0.1
