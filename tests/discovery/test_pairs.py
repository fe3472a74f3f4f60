from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from confsteer.discovery import moments
from confsteer.discovery.effects import ablation_effects
from confsteer.discovery.exact import ExactAblation
from confsteer.discovery.pairs import Points
from confsteer.last_layer.readout import FullOutputs, NormParameters, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

VOCAB, D_MODEL, NEURONS = 20_000, 24, 6


def heavy_tailed(n: int, seed: int, *, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3000), most=st.integers(1, 500), spread=st.lists(st.floats(0, 8), min_size=1, max_size=4))
def test_points_stand_for_all_of_the_probability(n: int, most: int, spread: list[float]) -> None:
    p = torch.stack([heavy_tailed(n, seed, spread=one) for seed, one in enumerate(spread)])
    points = Points.of(p, most)
    torch.testing.assert_close(points.weight.sum(dim=1), p.sum(dim=1), rtol=1e-4, atol=0)
    for row, every, weights, whether, count in zip(p, *points, strict=True):
        ids, weight, alone = every[:count], weights[:count], whether[:count]
        assert not weights[count:].any()
        assert torch.equal(weight[alone], row[ids[alone]])
        if n <= most + 1:
            assert torch.equal(ids, torch.arange(n))
            assert alone.all()
        else:
            assert len(ids) <= most + 1
            # Large ones are there once and alone; no other counts for more than one share.
            assert sorted(ids[alone].tolist()) == (row >= 1 / most).nonzero()[:, 0].tolist()
            others = weight[~alone]
            assert (others <= 1 / most * (1 + 1e-5)).all()
            assert (row[ids[~alone][others > 0]] > 0).all()


def test_points_of_a_distribution_do_not_depend_on_those_beside_it() -> None:
    p = torch.stack([heavy_tailed(3000, seed, spread=2.0 * seed) for seed in range(4)])
    together = Points.of(p, 200)
    for row, one in enumerate(p):
        alone = Points.of(one[None], 200)
        used = together.weight[row] > 0
        assert torch.equal(together.ids[row][used], alone.ids[0][alone.weight[0] > 0])
        torch.testing.assert_close(together.weight[row][used], alone.weight[0][alone.weight[0] > 0])


def test_points_sum_a_smooth_function_without_bias() -> None:
    """The mean error over distributions vanishes beside the error of one."""
    errors = []
    for seed in range(60):
        p = heavy_tailed(VOCAB, seed)
        g = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 + seed)).exp()
        points = Points.of(p[None], 512)
        errors.append(float(points.weight[0] @ g[points.ids[0]] - p @ g) / float(p @ g))
    spread = torch.tensor(errors)
    assert spread.abs().max() < 0.2
    assert spread.mean().abs() < 3 * spread.std() / len(errors) ** 0.5


def layer(*, write_norm: bool = False, softcap: float | None = None) -> tuple[Readout, TokenStates, Tensor, Unigram]:
    """A layer with a vocabulary that points must stand for, and moves of up to about a nat."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    norm = NormParameters(torch.ones(D_MODEL), None, 1e-5, False)
    readout = Readout.fold(
        w_out=draw(NEURONS, D_MODEL) * torch.tensor([0.1, 0.2, 0.4, 0.8, 1.2, 1.6])[:, None],
        unembedding=0.8 * draw(VOCAB, D_MODEL),
        norm=norm,
        softcap=softcap,
        write_norm=norm if write_norm else None,
    )
    tokens = 48
    states = TokenStates(
        activations=draw(tokens, NEURONS),
        residual=2 * draw(tokens, D_MODEL),
        mlp_output=draw(tokens, D_MODEL) if write_norm else None,
        targets=torch.randint(VOCAB, (tokens,), generator=g),
        window=torch.arange(tokens) // 12,
    )
    counts = torch.randint(0, 100, (VOCAB,), generator=g)
    return readout, states, 0.3 * draw(NEURONS), Unigram.from_counts(counts)


@pytest.mark.parametrize("kind", [{}, {"write_norm": True}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_neuron_means_are_within_half_a_percent_of_exact(
    kind: dict[str, object], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readout, states, mean, unigram = layer(**kind)  # type: ignore[arg-type]
    monkeypatch.setattr(moments, "has_fast_bfloat16", lambda device: half)
    fast, slopes = ablation_effects(readout, states, mean, unigram)
    exact = [
        ExactAblation(readout, unigram).effects(out, mean - states.activations[rows])
        for out, rows in FullOutputs.stream(readout, states)
    ]
    for name, ours in fast._asdict().items():
        theirs = torch.cat([getattr(part.effects, name) for part in exact]).double().abs().mean(0)
        error = (ours.double().abs().mean(0) - theirs).abs()
        # Under a softcap pairs are held along v, and the unigram distribution's part of the tail counted, to first order only.
        bound = 0.03 if "softcap" in kind and name in ("loss_without_frequency", "frequency_kl") else 0.005
        assert (error <= bound * theirs).all(), (name, error / theirs)
    for name, ours in slopes._asdict().items():
        torch.testing.assert_close(ours, torch.cat([getattr(part.slopes, name) for part in exact]), atol=2e-4, rtol=2e-3)


def test_many_pairs_of_that_layer_are_beyond_second_order() -> None:
    """Without them the test above would fail."""
    readout, states, mean, unigram = layer()
    expanded, _ = ablation_effects(readout, states, mean, unigram, pairs_above=float("inf"))
    fast, _ = ablation_effects(readout, states, mean, unigram)
    assert ((expanded.entropy - fast.entropy).abs() > 0.01).float().mean() > 0.1


def test_progress_rises_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    readout, states, mean, unigram = layer()
    monkeypatch.setattr(moments, "WORKING_SET", 2**17)
    seen: list[float] = []
    ablation_effects(readout, states, mean, unigram, on_progress=seen.append)
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


def test_two_threads_find_what_one_finds() -> None:
    readout, states, mean, unigram = layer(write_norm=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            exact = [
                ExactAblation(readout, unigram).effects(out, mean - states.activations[rows])
                for out, rows in FullOutputs.stream(readout, states)
            ]
            found.append((*ablation_effects(readout, states, mean, unigram), *(part.effects for part in exact)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        for ours, theirs in zip(one, two, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
