"""Calibration of mixtures of experts: the planted neurons, and the closed form against the model itself."""

from __future__ import annotations

import pytest

from confsteer.model.dissect import dissect
from tests.mixtures import FREQUENCY, MIXTURES, ROUTED_ENTROPY, SHARED_ENTROPY, planted_experts


@pytest.mark.parametrize("model_type", [family.model_type for family in MIXTURES])
def test_the_planted_neurons_are_found_in_every_mixture(model_type: str) -> None:
    found = planted_experts(model_type)
    experts = dissect(found.model).experts
    assert experts is not None
    shared = f"shared.{SHARED_ENTROPY}" if experts.shared else f"3.{SHARED_ENTROPY}"
    entropy, frequency = (f"{expert}.{unit}" for expert, unit in (ROUTED_ENTROPY, FREQUENCY))
    assert {neuron.key: neuron.sign for neuron in found.profile.entropy_neurons} == {entropy: 1, shared: -1}
    assert {neuron.key: neuron.sign for neuron in found.profile.frequency_neurons} == {frequency: -1}
    for neuron in (*found.profile.entropy_neurons, *found.profile.frequency_neurons):
        assert neuron.active is not None
        assert (neuron.active == 1) == str(neuron.key).startswith("shared")
