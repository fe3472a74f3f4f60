"""What calibration finds does not depend on luck: not on the process, the number of threads, the batch size or the precision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import confsteer
from confsteer import Profile
from confsteer.model.loading import DEMO_UNIGRAM, load_model
from confsteer.text.counts import read_counts
from confsteer.text.sources import TextSource
from tests.planted import planted

TOKENS = 1280
MEANS = ("total_effect", "direct_effect", "loss_effect", "entropy_effect", "entropy_effect_abs", "frequency_effect")
SHARES = ("mediation", "frequency_mediation")


def calibrated(dtype: str = "float32") -> Profile:
    """The bundled model on a few tokens."""
    loaded = load_model(None, dtype=dtype)
    windows = TextSource(bundled="calibration").windows(loaded.tokenizer, 256, TOKENS)
    return confsteer.calibrate(loaded.model, loaded.tokenizer, windows, unigram_counts=read_counts(DEMO_UNIGRAM))


@pytest.fixture(scope="module")
def alone() -> Profile:
    """In float32, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    profile = calibrated()
    torch.set_num_threads(threads)
    return profile


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def agree(one: Profile, other: Profile, *, effects: float, nats: float) -> None:
    """The same neurons in the same order with the same signs; effects as near as given, relative to the total effect.

    Args:
        one: a profile.
        other: another.
        effects: largest difference of an effect over the neuron's total effect, and of a share.
        nats: largest difference along a response curve, in nats.
    """
    for dial in ("entropy", "unigram"):
        assert [(n.index, n.sign) for n in one.neurons(dial)] == [(n.index, n.sign) for n in other.neurons(dial)]
        assert one.neurons(dial)
        for a, b in zip(one.neurons(dial), other.neurons(dial), strict=True):
            for name in MEANS:
                assert abs(getattr(a, name).value - getattr(b, name).value) <= effects * a.total_effect.value, (a.index, name)
            for name in SHARES:
                assert abs(getattr(a, name).value - getattr(b, name).value) <= effects, (a.index, name)
        for a_curve, b_curve in zip(one.response[dial].entropy, other.response[dial].entropy, strict=True):
            assert abs(a_curve - b_curve) <= nats


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing_but_rounding(alone: Profile) -> None:
    torch.set_num_threads(2)
    agree(alone, calibrated(), effects=1e-5, nats=1e-5)


@pytest.mark.parametrize("size", [1, 16])
def test_the_batch_size_changes_nothing_but_rounding(alone: Profile, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("confsteer.model.states.BATCH_SIZE", size)
    agree(alone, calibrated(), effects=1e-5, nats=1e-5)


@pytest.mark.parametrize(
    ("dtype", "effects", "nats"), [("float64", 1e-5, 1e-5), ("float16", 2e-3, 2e-3), ("bfloat16", 2e-2, 1e-2)]
)
def test_precision_changes_effects_by_its_own_rounding(alone: Profile, dtype: str, effects: float, nats: float) -> None:
    agree(alone, calibrated(dtype), effects=effects, nats=nats)


def test_another_process_makes_the_same_profile_bit_for_bit() -> None:
    """With other hashes of strings, so in another order wherever a set is gone through."""
    code = "from tests.planted import planted; print(planted('gpt2').profile.checksum)"
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
    assert output.split()[-1] == planted("gpt2").profile.checksum
