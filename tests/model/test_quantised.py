from __future__ import annotations

from typing import Any

import pytest
import torch

import confsteer
from confsteer.model.dissect import dissect
from confsteer.model.layers import output_weights
from tests.models import ENTROPY_NEURONS, FREQUENCY_NEURON, FREQUENCY_SIGN
from tests.planted import planted

torchao = pytest.importorskip("torchao.quantization")


def quantised() -> Any:
    """The planted Llama with all its linear layers in int8, as transformers and torchao make them."""
    import copy

    model = copy.deepcopy(planted("llama").model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def test_what_a_quantised_layer_writes_is_what_it_answers() -> None:
    model = quantised()
    anatomy = dissect(model)
    assert anatomy.quantised
    assert anatomy.n_neurons == planted("llama").profile.model.n_neurons
    a = torch.randn(5, anatomy.n_neurons)
    with torch.no_grad():
        torch.testing.assert_close(a @ output_weights(anatomy.down_proj), anatomy.down_proj(a), atol=1e-4, rtol=1e-4)


def test_the_planted_neurons_are_found_and_steered_in_a_quantised_model() -> None:
    _, tokenizer, texts, _ = planted("llama")
    model = quantised()
    profile = confsteer.calibrate(model, tokenizer, texts, window=64)
    assert {n.index: n.sign for n in profile.entropy_neurons} == ENTROPY_NEURONS
    assert {n.index: n.sign for n in profile.frequency_neurons} == {FREQUENCY_NEURON: FREQUENCY_SIGN}
    ids = torch.arange(1, 31)[None]

    def entropy() -> float:
        with torch.no_grad():
            log_p = model(ids, use_cache=False).logits.log_softmax(-1)
        return float(-(log_p.exp() * log_p).sum(-1).mean())

    before = entropy()
    with confsteer.steer(model, profile, entropy=0.1):
        assert entropy() > before + 0.03


def test_a_profile_of_the_whole_weights_does_not_fit_the_quantised_ones() -> None:
    with (
        pytest.raises(confsteer.ProfileMismatchError, match="other weights"),
        confsteer.steer(quantised(), planted("llama").profile),
    ):
        pass
