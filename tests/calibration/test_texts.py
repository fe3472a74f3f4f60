from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import confsteer
from confsteer import CorpusError, Profile, Response
from confsteer.cli import main
from confsteer.discovery.response import ResponseMeans, mean_over_texts
from confsteer.steering import DIALS, NeuronKey
from confsteer.text.several import join_windows
from confsteer.text.windows import Windows, make_windows
from tests.planted import planted


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    found = planted("gpt2")
    return make_windows(found.texts, found.tokenizer, window=64).counts(found.profile.model.tokenizer_size).numpy()


def calibrate(texts: Any, counts: np.ndarray, model_type: str = "gpt2") -> Profile:
    found = planted(model_type)
    return confsteer.calibrate(found.model, found.tokenizer, texts, window=64, unigram_counts=counts)


def logits(windows: Windows, model_type: str = "gpt2") -> Tensor:
    """Run the model itself, ``[kept tokens, vocab]``."""
    model = planted(model_type).model
    with torch.no_grad():
        kept = [model(batch.input_ids, use_cache=False).logits[batch.kept] for batch in windows.batches(16)]
    return torch.cat(kept).double()


def entropy(logits: Tensor) -> float:
    log_p = logits.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def differences(one: Response, other: Response) -> dict[str, float]:
    """Find the largest difference of each column."""
    return {
        name: max(abs(a - b) for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
        for name in Response.model_fields
    }


def test_two_copies_of_a_text_count_as_one(counts: np.ndarray) -> None:
    texts = planted("gpt2").texts
    one, two = calibrate(texts, counts), calibrate({"a": texts, "b": texts}, counts)
    assert one.responses_by_text == {}
    for dial, curve in two.response.items():
        # Standard deviations are unbiased: of twice as many tokens they are smaller by about one part in 4n.
        assert max(differences(curve, one.response[dial]).values()) < 1e-3
        assert two.responses_by_text["a"][dial] == two.responses_by_text["b"][dial] == curve
    for name, column in one.columns.items():
        if not name.endswith("_standard_error") and name != "effect_tokens":
            torch.testing.assert_close(two.columns[name], column, rtol=1e-3, atol=1e-6, msg=name)
    assert [n.index for n in two.entropy_neurons] == [n.index for n in one.entropy_neurons]


@pytest.fixture(scope="module")
def two(counts: np.ndarray) -> Profile:
    texts = planted("gpt2").texts
    return calibrate({"long": texts[5:], "short": texts[:5]}, counts)


def test_the_pooled_response_is_the_mean_over_texts_of_any_size(two: Profile) -> None:
    for dial in DIALS:
        long, short = (two.responses_by_text[name][dial] for name in ("long", "short"))
        assert differences(long, short)["entropy"] > 1e-2
        for name in ("entropy", "kl_model_unigram", "kl_unigram_model", "loss", "argmax_changed"):
            mean = [(a + b) / 2 for a, b in zip(getattr(long, name), getattr(short, name), strict=True)]
            assert getattr(two.response[dial], name) == pytest.approx(mean, rel=1e-9)


def test_the_mean_over_texts_is_at_their_own_positions() -> None:
    """A number that is added up three times and divided by three is often another."""
    columns = torch.rand(8, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_texts = [ResponseMeans(columns[0], *(column + i for column in columns[1:7])) for i in range(3)]
    assert not torch.equal(columns[:1].expand(3, -1).mean(dim=0), columns[0])
    pooled = mean_over_texts(of_texts)
    assert torch.equal(pooled.position, columns[0])
    torch.testing.assert_close(pooled.entropy, columns[1] + 1)


def test_each_text_has_the_response_that_it_has_alone(two: Profile) -> None:
    """The model itself, pushed: on each text the entropies are those of its curve."""
    found = planted("gpt2")
    for name, texts in (("long", found.texts[5:]), ("short", found.texts[:5])):
        windows, curve = make_windows(texts, found.tokenizer, window=64), two.responses_by_text[name]["entropy"]
        assert curve.entropy[curve.zero] == pytest.approx(entropy(logits(windows)), rel=1e-5)
        for at in (2, -3):
            push: dict[NeuronKey, float] = {n.index: curve.position[at] * n.sign * n.std_activation for n in two.entropy_neurons}
            with confsteer.steer(found.model, two, shift=push):
                assert entropy(logits(windows)) == pytest.approx(curve.entropy[at], rel=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_at_its_temperature_the_unsteered_model_has_the_entropy_of_each_position(model_type: str, counts: np.ndarray) -> None:
    found = planted(model_type)
    texts = {"long": found.texts[5:], "short": found.texts[:5]}
    profile = calibrate(texts, counts, model_type)
    of_text = [logits(make_windows(text, found.tokenizer, window=64), model_type) for text in texts.values()]
    for dial, pooled in profile.response.items():
        for curve, some in (
            (pooled, of_text),
            *((profile.responses_by_text[name][dial], [own]) for name, own in zip(texts, of_text, strict=True)),
        ):
            assert curve.temperature[curve.zero] == 1
            assert None not in curve.temperature
            for temperature, expected in zip(curve.temperature, curve.entropy, strict=True):
                assert temperature is not None
                mean = sum(entropy(one / temperature) for one in some) / len(some)
                assert mean == pytest.approx(expected, abs=5e-5)


def test_a_temperature_out_of_range_is_not_made_up() -> None:
    from confsteer.discovery.temperature import EntropyMeans

    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    linear = EntropyMeans(x, 3 + x, torch.ones_like(x))
    found = linear.temperature_of(torch.tensor([-2.5, -2.0, 0.25, 1.75, 2.01])).log().tolist()
    assert [math.isnan(value) for value in found] == [True, False, False, False, True]
    assert found[1:4] == pytest.approx([-2, 0.25, 1.75])


def test_windows_of_several_texts_stay_apart() -> None:
    found = planted("gpt2")
    parts = {
        name: make_windows(found.texts[rows], found.tokenizer, window=64) for name, rows in (("a", slice(3)), ("b", slice(3, 9)))
    }
    joined = join_windows(parts)
    assert joined.text_tokens == tuple(part.n_tokens for part in parts.values())
    assert joined.source == "a + b"
    own = [(text, batch) for text, part in enumerate(parts.values()) for batch in part.batches(4)]
    for batch, (text, alone) in zip(joined.batches(4), own, strict=True):
        assert batch.text == text
        assert torch.equal(batch.input_ids, alone.input_ids)
        assert torch.equal(batch.kept, alone.kept)
    assert len(np.unique(joined.document)) == 9
    with pytest.raises(CorpusError, match="there is no text"):
        join_windows({})
    with pytest.raises(CorpusError, match="b: no token counts"):
        join_windows({"a": parts["a"], "b": make_windows(["<eos> " * 100], found.tokenizer, window=64, source="b")})


def test_the_command_takes_each_text_for_itself(tmp_path: Path, counts: np.ndarray) -> None:
    found = planted("gpt2")
    found.save(tmp_path)
    for name, texts in (("a", found.texts[5:]), ("b", found.texts[:5])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number:02}.txt").write_text(text)
    np.save(tmp_path / "counts.npy", counts)
    command = ["calibrate", str(tmp_path / "model"), "--window", "64", "--unigram", str(tmp_path / "counts.npy")]
    command += ["--out", str(tmp_path / "p"), "--tokens", "1500"]
    result = CliRunner().invoke(main, [*command, "--text", str(tmp_path / "a"), "--text", str(tmp_path / "b")])
    assert result.exit_code == 0, (result.output, result.exception)
    profile = Profile.load(tmp_path / "p")
    assert profile.responses_by_text.keys() == {"a", "b"}
    assert profile.corpus
    assert profile.corpus.tokens == 1500 + 5 * 200
    result = CliRunner().invoke(main, [*command, "--text", str(tmp_path / "a"), "--text", str(tmp_path / "a")])
    assert result.exit_code == 1
    assert "two texts are called 'a'" in result.output
