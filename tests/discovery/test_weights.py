from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from confsteer import CorpusError, SettingError
from confsteer.discovery.frequency import chance_frequency_cosine, frequency_cosine
from confsteer.discovery.select import percentile
from confsteer.discovery.weights import (
    _left_out_error,
    chance_null_fraction,
    choose_null_dims,
    unembedding_spectrum,
    weight_statistics,
)
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.unigram import Unigram
from tests.discovery.test_effects import random_readout, random_unigram


@pytest.mark.parametrize("centred", [True, False])
def test_statistics_equal_loops_over_their_definition(centred: bool) -> None:
    readout = random_readout(centred=centred, bias=False, neurons=9, vocab=60, d=12)
    statistics = weight_statistics(readout, null_dims=3)
    W = readout.unembedding.double().numpy()
    _, _, right = np.linalg.svd(W)
    right = right[:11] if centred else right  # a centred W has the all-ones direction as its last, of singular value zero
    for i, w in enumerate(readout.w_out.double().numpy()):
        cosines = []
        for row in W:
            dot = sum(a * b for a, b in zip(row, w, strict=True))
            cosines.append(dot / math.sqrt(sum(a * a for a in row)) / math.sqrt(sum(b * b for b in w)))
        mean = sum(cosines) / len(cosines)
        variance = sum((c - mean) ** 2 for c in cosines) / (len(cosines) - 1)
        null = math.sqrt(sum(float(direction @ w) ** 2 for direction in right[-3:]))
        assert statistics.norm[i] == pytest.approx(math.sqrt(sum(b * b for b in w)), rel=1e-6)
        assert statistics.logit_variance[i] == pytest.approx(variance, rel=1e-9)
        assert statistics.null_fraction[i] == pytest.approx(null / math.sqrt(sum(b * b for b in w)), rel=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_spectrum_equals_the_singular_values(centred: bool) -> None:
    readout = random_readout(centred=centred, bias=False)
    spectrum = unembedding_spectrum(readout)
    theirs = torch.linalg.svdvals(readout.unembedding.double()).flip(0)
    torch.testing.assert_close(spectrum.singular_values, theirs[1:] if centred else theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        (readout.unembedding.double() @ spectrum.directions).norm(dim=0), spectrum.singular_values, rtol=1e-6, atol=1e-6
    )
    if centred:
        assert spectrum.directions.sum(dim=0).abs().max() < 1e-7


@given(null=st.integers(1, 8), low=st.floats(0.0, 0.2), seed=st.integers(0, 1000))
def test_the_cliff_is_found_where_it_is(null: int, low: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.linspace(1.0, 3.0, 64 - null) + 0.01 * torch.rand(64 - null, generator=generator)
    values = torch.cat([low * (0.5 + 0.02 * torch.rand(null, generator=generator)), bulk]).sort().values
    assert choose_null_dims(values) == null


@pytest.mark.parametrize("n", [3, 4, 9])
def test_left_out_error_is_that_of_refitting(n: int) -> None:
    y = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = np.arange(n)
    error = 0.0
    for i in range(n):
        rest = x != i
        slope, intercept = np.polyfit(x[rest], y.numpy()[rest], 1)
        error += (float(y[i]) - slope * i - intercept) ** 2
    assert _left_out_error(y) == pytest.approx(error)


def test_null_dims_out_of_range_are_refused() -> None:
    readout = random_readout(centred=True, bias=False, d=12)
    for k in (0, 11, 12):
        with pytest.raises(SettingError, match=f"null_dims is {k}; it must be between 1 and 10"):
            weight_statistics(readout, null_dims=k)


def test_chance_is_what_random_writes_reach_one_time_in_twenty() -> None:
    d, k, neurons = 48, 5, 64
    chance = chance_null_fraction(d, k, neurons)
    generator = torch.Generator().manual_seed(9)
    writes = torch.randn(2000, neurons, d, generator=generator)
    largest = (writes[..., :k].norm(dim=-1) / writes.norm(dim=-1)).max(dim=1).values
    assert 0.02 < float((largest > chance).double().mean()) < 0.09
    assert chance > math.sqrt(k / d)


def test_chance_cosine_is_what_random_writes_reach() -> None:
    readout = random_readout(centred=False, bias=False, neurons=50)
    unigram = random_unigram(readout.vocab_size)
    chance = chance_frequency_cosine(readout, unigram)
    exceeded = 0
    for seed in range(100):
        w = torch.randn(50, readout.d_model, generator=torch.Generator().manual_seed(1000 + seed))
        other = Readout(w, readout.unembedding, readout.logit_bias, readout.epsilon, readout.centred)
        exceeded += bool((frequency_cosine(other, unigram).abs() > chance).any())
    assert exceeded <= 20


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["centred over the vocabulary", "not centred"])
def test_frequency_cosine_is_the_cosine_in_logit_space(softcap: float | None) -> None:
    readout = random_readout(centred=True, bias=False, softcap=softcap)
    unigram = random_unigram(readout.vocab_size)
    writes = readout.w_out.double() @ readout.unembedding.double().T
    writes = writes - writes.mean(dim=1, keepdim=True)
    v = unigram.log_frequency.double() - unigram.log_frequency.double().mean()
    expected = writes @ v / writes.norm(dim=1) / v.norm()
    torch.testing.assert_close(frequency_cosine(readout, unigram), expected, atol=1e-6, rtol=1e-5)


def test_unigram_counts_one_extra_of_every_token() -> None:
    unigram = Unigram.from_counts(torch.tensor([0, 1, 7]))
    torch.testing.assert_close(unigram.log_frequency.exp(), torch.tensor([1 / 11, 2 / 11, 8 / 11]))
    assert float(unigram.direction.norm()) == pytest.approx(1)
    assert float(unigram.direction.sum()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        unigram.length * unigram.direction, unigram.log_frequency - unigram.log_frequency.mean(), atol=1e-6, rtol=1e-6
    )
    with pytest.raises(ValueError, match="negative"):
        Unigram.from_counts(torch.tensor([1, -1]))
    with pytest.raises(CorpusError, match="equally frequent"):
        Unigram.from_counts(torch.tensor([3, 3, 3]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_percentile_is_the_share_at_or_below(values: list[int]) -> None:
    expected = [100 * sum(other <= value for other in values) / len(values) for value in values]
    ours: Tensor = percentile(torch.tensor(values, dtype=torch.float64))
    assert ours.tolist() == pytest.approx(expected)
