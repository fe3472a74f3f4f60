from __future__ import annotations

import pytest
import torch
from torch import Tensor

from confsteer.discovery import series
from confsteer.discovery.exact import ExactAblation
from confsteer.discovery.series import Series
from confsteer.discovery.temperature import OCTAVES, PER_OCTAVE, EntropyByTemperature
from confsteer.discovery.token_effects import Sums, TokenEffects, TokenSlopes
from confsteer.last_layer.readout import FullOutputs, NormParameters, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram
from tests.discovery.test_effects import by_definition, random_mean, random_readout, random_states, random_unigram

VOCAB = 1500
TOKENS, NEURONS = 20, 12
BIASED = pytest.mark.parametrize("bias", [False, True])


def problem(bias: bool, scale: float) -> tuple[Readout, FullOutputs, Tensor, Unigram, TokenEffects]:
    """A layer, the outputs of some tokens, what ablation adds to the activations, and its effects by definition."""
    readout = random_readout(centred=bias, bias=bias, vocab=VOCAB, neurons=NEURONS)
    states, mean, unigram = random_states(readout, TOKENS, scale), random_mean(readout), random_unigram(VOCAB)
    ((outputs, _),) = FullOutputs.stream(readout, states)
    return readout, outputs, mean - states.activations, unigram, by_definition(readout, states, mean, unigram)


def sum_series(readout: Readout, outputs: FullOutputs, delta: Tensor, unigram: Unigram) -> tuple[Sums, Tensor]:
    """Sums by the series alone, and which of them it calls good."""
    moves, slopes = readout.move(outputs.state, delta), TokenSlopes.empty(delta)
    sums = Sums.empty(delta, len(moves.write))
    good = Series(readout, readout.w_out @ readout.unembedding.T, unigram).sum(outputs, moves, sums, slopes)
    return sums, good


@BIASED
@pytest.mark.parametrize(("scale", "least", "most"), [(0.1, 0.9, 1), (0.5, 0.3, 0.95), (3, 0, 0.3)])
def test_a_pair_called_good_is_within_the_tolerance(bias: bool, scale: float, least: float, most: float) -> None:
    readout, outputs, delta, unigram, exact = problem(bias, scale)
    sums, good = sum_series(readout, outputs, delta, unigram)
    assert least <= float(good.double().mean()) <= most
    effects = sums.effects(unigram.direction[outputs.targets, None])
    for name, ours, theirs in zip(effects._fields, effects, exact, strict=True):
        torch.testing.assert_close(ours.double()[good], theirs[good], atol=series.TOLERANCE, rtol=0, msg=name)


@BIASED
@pytest.mark.parametrize("scale", [0.1, 0.5, 3])
def test_all_pairs_equal_the_definition(bias: bool, scale: float) -> None:
    readout, outputs, delta, unigram, exact = problem(bias, scale)
    result = ExactAblation(readout, unigram).effects(outputs, delta)
    for ours, theirs in zip(result.effects, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@BIASED
def test_neither_stretches_of_the_vocabulary_nor_blocks_of_tokens_change_anything(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readout, outputs, delta, unigram, _ = problem(bias, 0.5)
    whole = ExactAblation(readout, unigram).effects(outputs, delta)
    monkeypatch.setattr("confsteer.discovery.exact.MOST_TOKENS", 7)
    monkeypatch.setattr("confsteer.last_layer.readout.CACHED_SET", 73 * 50)  # 30 stretches, the last shorter
    assert len(list(readout.blocks(VOCAB, 73))) > series.PARTS_PER_THREAD * torch.get_num_threads()
    in_parts = ExactAblation(readout, unigram).effects(outputs, delta)
    for one, other in zip((*whole.effects, *whole.slopes), (*in_parts.effects, *in_parts.slopes), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.argmax_changed, in_parts.argmax_changed)


@BIASED
def test_the_series_ends_where_taylor_says(bias: bool) -> None:
    """Without the check of the remainder the same pairs are wrong, so the test above can fail."""
    readout, outputs, delta, unigram, exact = problem(bias, 3)
    sums, _ = sum_series(readout, outputs, delta, unigram)
    assert (sums.effects(unigram.direction[outputs.targets, None]).entropy - exact.entropy).abs().nan_to_num(1).max() > 0.1


@BIASED
@pytest.mark.parametrize("scale", [0.1, 1])
def test_slopes_and_argmax_equal_those_of_exponentials(bias: bool, scale: float) -> None:
    readout, outputs, delta, unigram, _ = problem(bias, scale)
    ablation = ExactAblation(readout, unigram)
    by_series = ablation.effects(outputs, delta)
    ablation._series = None
    by_exponentials = ablation.effects(outputs, delta)
    for ours, theirs in zip(by_series.slopes, by_exponentials.slopes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert torch.equal(by_series.argmax_changed, by_exponentials.argmax_changed)
    torch.testing.assert_close(by_series.entropy, by_exponentials.entropy, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(by_series.loss, by_exponentials.loss, atol=2e-6, rtol=1e-6)


@BIASED
def test_the_likeliest_token_is_found_wherever_it_is(bias: bool) -> None:
    """A write to a token far down the list makes it the likeliest: outside of the stretches that are looked at."""
    readout, outputs, *_, unigram, _ = problem(bias, 0.1)
    lowest = outputs.y[0].argmin()
    write = readout.unembedding[lowest] / readout.unembedding[lowest].norm()
    one = Readout(write[None], *(getattr(readout, name) for name in ("unembedding", "logit_bias", "epsilon", "centred")))
    delta = torch.linspace(-40, 40, TOKENS)[:, None]
    states = outputs.at(torch.zeros(TOKENS, dtype=torch.long))
    changed = ExactAblation(one, unigram).effects(states, delta).argmax_changed[:, 0]
    moved = one.logits(states.state.residual + delta * write)
    assert torch.equal(changed, moved.argmax(dim=-1) != outputs.argmax[0])
    assert changed.any()
    assert not changed.all()


@pytest.mark.parametrize("bound", [3, 6, 12])
def test_rounding_of_a_certain_token_is_no_small_remainder(bound: float) -> None:
    """Where the neurons promote a token that is nearly certain, the last term is rounding noise of either sign."""
    g = torch.Generator().manual_seed(0)
    tokens, d = 64, 64
    unembedding = torch.randn(1000, d, generator=g)
    norm = NormParameters(torch.ones(d), None, 1e-6, False)
    towards_them = unembedding[:tokens] + 0.3 * torch.randn(tokens, d, generator=g)
    readout = Readout.fold(w_out=towards_them, unembedding=unembedding, norm=norm)
    u = readout.w_out @ readout.unembedding.T
    residual = unembedding[:tokens]
    activations = -bound * readout.norm_scale(residual)[:, None] / u.abs().amax(dim=1)
    activations[:, ::2] *= -1
    states = TokenStates(activations, residual, None, torch.arange(tokens), torch.zeros(tokens, dtype=torch.long))
    mean, unigram = torch.zeros(tokens), random_unigram(1000)
    ((outputs, _),) = FullOutputs.stream(readout, states)
    exact = by_definition(readout, states, mean, unigram)
    for ours, theirs in zip(ExactAblation(readout, unigram).effects(outputs, mean - activations).effects, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)


def test_the_entropy_is_exact_over_a_large_vocabulary() -> None:
    """A plain float32 sum over a quarter of a million entries would lose those that come last."""
    vocab, d = 2**18, 16
    g = torch.Generator().manual_seed(0)
    norm = NormParameters(torch.ones(d), None, 1e-6, False)
    readout = Readout.fold(w_out=torch.randn(1, d, generator=g), unembedding=torch.randn(vocab, d, generator=g), norm=norm)
    residual = torch.randn(20, d, generator=g)
    states = TokenStates(torch.zeros(20, 1), residual, None, torch.arange(20), torch.zeros(20, dtype=torch.long))
    for outputs, rows in FullOutputs.stream(readout, states):
        by_series = ExactAblation(readout, random_unigram(vocab)).effects(outputs, torch.full((len(outputs.y), 1), 0.1))
        z = readout.logits(residual[rows]).double()
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(by_series.entropy.double(), entropy, atol=1e-5, rtol=0)
        temperatures = EntropyByTemperature(readout)
        temperatures.update(outputs)
        at_one = temperatures.result().entropy[OCTAVES * PER_OCTAVE]
        assert float(at_one) == pytest.approx(float(entropy.mean()), abs=1e-5)


def test_tiny_writes_and_large_activations_neither_vanish_nor_overflow() -> None:
    """The sixth power of a write of 1e-9 is no float32."""
    readout, outputs, delta, unigram, _ = problem(False, 0.1)
    tiny = Readout(readout.w_out * 1e-9, readout.unembedding, readout.logit_bias, readout.epsilon, readout.centred)
    expected, good = sum_series(readout, outputs, delta, unigram)
    sums, good_too = sum_series(tiny, outputs, delta * 1e9, unigram)
    assert torch.equal(good, good_too)
    torch.testing.assert_close(sums.of_moves, expected.of_moves, atol=1e-6, rtol=1e-4)
