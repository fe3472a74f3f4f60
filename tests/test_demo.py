"""The bundled model shows what the paper describes."""

from __future__ import annotations

import pytest
import torch

import confsteer
from confsteer import Steering, demo
from confsteer.corpus import python_docs, read_counts
from confsteer.demo import Demo
from confsteer.evaluation.harness import Evaluation, evaluate
from confsteer.loading import DEMO_UNIGRAM

ASKED = (-0.3, -0.15, 0.15, 0.3)


@pytest.fixture(scope="module")
def bundled() -> Demo:
    return demo.load()


@pytest.fixture(scope="module")
def held_out(bundled: Demo) -> Evaluation:
    steerings = [Steering(scale={"entropy": 0.0}), *(Steering(entropy=change) for change in ASKED)]
    return evaluate(*bundled[:2], python_docs("held-out"), bundled.profile, steerings, tokens=15_000)


def test_it_has_entropy_neurons_that_act_through_the_norm(bundled: Demo) -> None:
    assert sum(neuron.mediation.value >= 0.8 for neuron in bundled.profile.entropy_neurons) >= 4


def test_it_grew_token_frequency_neurons_by_itself(bundled: Demo) -> None:
    """None were planted: all of them are outside the eight reserved neurons."""
    neurons = bundled.profile.frequency_neurons
    assert len(neurons) >= 2
    assert all(neuron.index < bundled.profile.model.n_neurons - 8 for neuron in neurons)


def test_ablating_the_entropy_neurons_together_changes_unseen_entropy(held_out: Evaluation) -> None:
    unsteered, ablated, *_ = (row.metrics["entropy"] for row in held_out.results)
    assert abs(ablated.value - unsteered.value) / unsteered.value >= 0.02


def test_the_entropy_dial_is_accurate_on_unseen_text(held_out: Evaluation) -> None:
    unsteered, _, *steered = (row.metrics["entropy"].value for row in held_out.results)
    assert [value - unsteered for value in steered] == pytest.approx(ASKED, rel=0.15)


def test_its_shipped_profile_is_what_calibration_gives(bundled: Demo) -> None:
    again = confsteer.calibrate(
        bundled.model,
        bundled.tokenizer,
        python_docs("calibration"),
        unigram_counts=read_counts(DEMO_UNIGRAM),
        source=bundled.profile.corpus.source,
    )
    if again.corpus.sha256 != bundled.profile.corpus.sha256:
        pytest.skip("this Python ships other documentation")
    assert [n.index for n in again.entropy_neurons] == [n.index for n in bundled.profile.entropy_neurons]
    for ours, shipped in zip(again.entropy_neurons, bundled.profile.entropy_neurons, strict=True):
        assert ours.entropy_effect_abs.value == pytest.approx(shipped.entropy_effect_abs.value, rel=1e-3)
    assert again.reach("entropy") == pytest.approx(bundled.profile.reach("entropy"), abs=1e-3)


def test_it_is_small_enough_to_ship() -> None:
    from confsteer.loading import DEMO

    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 15e6


def test_its_reserved_neurons_write_only_where_nothing_is_read(bundled: Demo) -> None:
    """The structure that was given, exactly: see the model card."""
    write = bundled.model.get_parameter("transformer.h.3.mlp.c_proj.weight")
    assert torch.equal(bundled.model.lm_head.weight[:, -8:], torch.zeros(4096, 8))
    assert not write[-8:, :-8].any()
    assert not write[:-8, -8:].any()
    torch.testing.assert_close(write[-8:].sum(dim=1), torch.zeros(8), atol=1e-5, rtol=0)
