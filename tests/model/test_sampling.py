from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import confsteer
from confsteer import CorpusError, SettingError
from confsteer.model.sampling import sample_windows
from confsteer.text.windows import Windows
from tests.models import FAMILIES, VOCAB, TinyFamily, planted_model, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FAMILY = {family.model_type: family for family in FAMILIES}


def documents(windows: Windows) -> list[list[int]]:
    return [windows.token_ids[first:last].tolist() for first, last in itertools.pairwise(windows.starts)]


def model_of(p: torch.Tensor) -> Any:
    """A GPT-2 whose next-token distribution is ``p [vocab]`` whatever it reads."""
    model = tiny_model(*FAMILY["gpt2"])
    model.lm_head = torch.nn.Linear(32, len(p), bias=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.lm_head.weight.zero_()[:, 0] = p.log()
    return model


def test_tokens_come_as_often_as_the_model_says() -> None:
    p = torch.arange(VOCAB).float()  # EOS, 0, never
    p /= p.sum()
    windows = sample_windows(model_of(p), TOKENIZER, tokens=40_000, window=64)
    assert windows.n_tokens == 40_000
    n = windows.n_tokens - len(windows)  # the first token of each is BOS
    counts = windows.counts(VOCAB)
    assert int(counts.sum()) == n
    errors = (counts[1:] - n * p[1:]) / (n * p[1:] * (1 - p[1:])).sqrt()
    assert errors.abs().max() < 4.5
    assert errors.std() == pytest.approx(1, abs=0.25)


def test_settings_that_come_with_the_model_do_not_apply() -> None:
    model = model_of(torch.full((VOCAB,), 1 / VOCAB))
    plain = sample_windows(model, TOKENIZER, tokens=2000, window=64)
    model.generation_config.update(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, suppress_tokens=[3, 4], max_new_tokens=3, num_beams=4
    )
    assert sample_windows(model, TOKENIZER, tokens=2000, window=64).sha256 == plain.sha256


def test_a_document_ends_at_the_end_of_text_and_at_no_other_place() -> None:
    p = torch.full((VOCAB,), 1.0)
    p[0], p[7] = 4.0, 4.0
    model = model_of(p / p.sum())
    for document in documents(sample_windows(model, TOKENIZER, tokens=3000, window=64))[:-1]:
        assert document[0] == 0
        assert 0 not in document[1:-1]
        assert document[-1] == 0 or len(document) == 64
    model.generation_config.eos_token_id = [7]  # the end of a chat model's turn
    for document in documents(sample_windows(model, TOKENIZER, tokens=3000, window=64))[:-1]:
        assert not {0, 7} & set(document[1:-1])
        assert document[-1] in {0, 7} or len(document) == 64


def test_the_seed_alone_decides() -> None:
    model = tiny_model(*FAMILY["llama"])
    first = sample_windows(model, TOKENIZER, tokens=1000, window=32, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = sample_windows(model, TOKENIZER, tokens=1000, window=32, seed=3)
    assert again.sha256 == first.sha256
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_windows(model, TOKENIZER, tokens=1000, window=32, seed=4).sha256 != first.sha256
    assert first.source == "text sampled from the model itself (seed 3)"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_cache_changes_nothing(family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws from forward passes over the whole text give the same text."""
    model, tokenizer = tiny_model(*family), tiny_tokenizer()
    tokenizer.eos_token = model.generation_config.eos_token_id = None  # long documents
    cached = sample_windows(model, tokenizer, tokens=200, window=20)
    forward, read = type(model).forward, torch.zeros(0)

    def uncached(self: Any, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        nonlocal read
        read = input_ids if past_key_values is None else torch.cat([read, input_ids], dim=1)
        output = forward(self, input_ids=read, use_cache=False)
        output.past_key_values = "continues"
        return output

    monkeypatch.setattr(type(model), "forward", uncached)
    assert sample_windows(model, tokenizer, tokens=200, window=20).sha256 == cached.sha256


def test_padded_rows_of_the_vocabulary_are_not_drawn() -> None:
    p = torch.full((VOCAB + 32,), 1.0)
    p[VOCAB:] = 100.0
    assert sample_windows(model_of(p / p.sum()), TOKENIZER, tokens=2000, window=64).token_ids.max() < VOCAB


def test_without_bos_and_eos_the_first_token_is_drawn_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    model = model_of(torch.full((VOCAB,), 1 / VOCAB))
    model.generation_config.eos_token_id = None
    windows = sample_windows(model, tokenizer, tokens=3200, window=16)
    assert len({document[0] for document in documents(windows)}) > VOCAB / 2
    tokenizer.eos_token = "t5"
    assert {document[0] for document in documents(sample_windows(model, tokenizer, tokens=3200, window=16))} == {5}


def test_a_model_that_says_nothing_is_refused() -> None:
    p = torch.full((VOCAB,), 1e-9)
    p[0] = 1.0
    with pytest.raises(CorpusError, match="100 in a row had fewer than 8 tokens"):
        sample_windows(model_of(p / p.sum()), TOKENIZER, tokens=100, window=64)
    with pytest.raises(SettingError, match="does not fit the model's context of 64"):
        sample_windows(model_of(p / p.sum()), TOKENIZER, tokens=100, window=65)


def test_calibration_without_text_is_on_the_models_own() -> None:
    counts = torch.ones(VOCAB)
    model = planted_model("llama", counts + torch.arange(VOCAB))
    profile = confsteer.calibrate(model, TOKENIZER, tokens=2000, window=64, seed=5)
    windows = sample_windows(model, TOKENIZER, tokens=2000, window=64, seed=5)
    assert profile.corpus
    assert profile.corpus.source == "text sampled from the model itself (seed 5)"
    assert profile.corpus.sha256 == windows.sha256
    assert confsteer.calibrate(model, TOKENIZER, windows, seed=5) == profile
