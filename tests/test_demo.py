"""The bundled model shows what the paper describes."""

from __future__ import annotations

import pytest
import torch

import confsteer
from confsteer import Steering, demo
from confsteer.demo import Demo
from confsteer.evaluation.evaluate import Evaluation, evaluate
from confsteer.last_layer.scores import TokenScores
from confsteer.model.loading import DEMO_UNIGRAM
from confsteer.text.counts import read_counts
from confsteer.text.sources import python_docs
from confsteer.text.windows import make_windows

ASKED = (-0.15, 0.15, 0.3, 0.6)


@pytest.fixture(scope="module")
def bundled() -> Demo:
    return demo.load()


@pytest.fixture(scope="module")
def held_out(bundled: Demo) -> Evaluation:
    steerings = [Steering(entropy=change) for change in ASKED]
    return evaluate(*bundled[:2], python_docs("held-out"), bundled.profile, steerings, tokens=15_000)


def test_it_has_entropy_neurons_that_act_through_the_norm(bundled: Demo) -> None:
    assert sum(neuron.mediation.value >= 0.8 for neuron in bundled.profile.entropy_neurons) >= 4


def test_it_grew_token_frequency_neurons_by_itself(bundled: Demo) -> None:
    """None were planted: all of them are outside the eight reserved neurons."""
    neurons = bundled.profile.frequency_neurons
    assert len(neurons) >= 2
    assert all(neuron.index < bundled.profile.model.n_neurons - 8 for neuron in neurons)


def test_the_entropy_neurons_together_matter_on_unseen_text(bundled: Demo) -> None:
    """Set to their means they change a token's entropy by over 5 % on average, up or down; set to zero they lower the mean."""
    windows = make_windows(python_docs("held-out"), bundled.tokenizer, max_tokens=15_000)
    entropies: list[list[torch.Tensor]] = [[], [], []]
    with torch.no_grad(), confsteer.steer(bundled.model, bundled.profile) as steerer:
        for batch in windows.batches(4):
            for kept, request in zip(entropies, (None, "scale.entropy=0", "clamp.entropy=0"), strict=True):
                steerer.update(request)
                logits = bundled.model(batch.input_ids, attention_mask=batch.attention_mask).logits
                kept.append(TokenScores.of(logits[batch.kept], batch.targets).entropy)
    unsteered, at_mean, at_zero = (torch.cat(kept) for kept in entropies)
    assert float((at_mean - unsteered).abs().mean() / unsteered.mean()) > 0.05
    assert float((at_zero - unsteered).mean() / unsteered.mean()) < -0.05


def test_it_has_learned_induction(bundled: Demo) -> None:
    """Random tokens are predicted at their second reading, which nothing but the first reading makes possible."""
    ids = torch.randint(300, 4096, (16, 100), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    with torch.no_grad():
        nll = TokenScores.of(bundled.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).nll.view(16, -1)
    assert float(nll[:, :99].mean() - nll[:, 100:].mean()) > 5


def test_the_entropy_dial_is_accurate_on_unseen_text(held_out: Evaluation) -> None:
    (text,) = held_out.texts
    unsteered = text.rows[0].metrics["entropy"].value
    assert [row.metrics["entropy"].value - unsteered for row in text.of_kind("steering")] == pytest.approx(ASKED, rel=0.15)


def test_its_shipped_profile_is_what_calibration_gives(bundled: Demo) -> None:
    corpus = bundled.profile.corpus
    assert corpus is not None
    again = confsteer.calibrate(
        bundled.model,
        bundled.tokenizer,
        python_docs("calibration"),
        unigram_counts=read_counts(DEMO_UNIGRAM),
        source=corpus.source,
    )
    if again.corpus is None or again.corpus.sha256 != corpus.sha256:
        pytest.skip("this Python ships other documentation")
    assert [n.index for n in again.entropy_neurons] == [n.index for n in bundled.profile.entropy_neurons]
    for ours, shipped in zip(again.entropy_neurons, bundled.profile.entropy_neurons, strict=True):
        assert ours.entropy_effect_abs.value == pytest.approx(shipped.entropy_effect_abs.value, rel=1e-3)
    assert again.reach("entropy") == pytest.approx(bundled.profile.reach("entropy"), abs=1e-3)


def test_it_is_small_enough_to_ship() -> None:
    from confsteer.model.loading import DEMO

    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 15e6


def test_its_reserved_neurons_write_only_where_nothing_is_read(bundled: Demo) -> None:
    """The structure that was given, exactly: see the model card."""
    write = bundled.model.get_parameter("transformer.h.3.mlp.c_proj.weight")
    assert torch.equal(bundled.model.lm_head.weight[:, -8:], torch.zeros(4096, 8))
    assert not write[-8:, :-8].any()
    assert not write[:-8, -8:].any()
    torch.testing.assert_close(write[-8:].sum(dim=1), torch.zeros(8), atol=1e-5, rtol=0)
