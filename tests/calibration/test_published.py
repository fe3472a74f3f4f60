from __future__ import annotations

from pathlib import Path

import pytest

import confsteer
from confsteer import Profile, SettingError
from confsteer.calibration import published as module
from confsteer.calibration.published import PublishedList, PublishedModel, agreement, published, published_models
from confsteer.discovery.select import candidates
from tests.models import ENTROPY_NEURONS
from tests.planted import planted
from tests.test_cli import run


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A scan of a planted model."""
    folder = tmp_path_factory.mktemp("published")
    planted("llama").save(folder)
    return confsteer.scan(str(folder / "model")).profile


def of(profile: Profile, *neurons: int, kind: module.Kind = "entropy", layer: int | None = None) -> PublishedModel:
    one = PublishedList(source="a paper", kind=kind, neurons=neurons)
    return PublishedModel(id="someone/model", layer=profile.model.layer if layer is None else layer, lists=(one,))


def test_the_list_is_sound() -> None:
    models = published_models()
    assert len(models) >= 17
    for model in models.values():
        assert model.lists
        for one in model.lists:
            assert len(set(one.neurons)) == len(one.neurons)
            assert one.null_fraction.keys() <= set(one.neurons)
            assert all(0 < value <= 1 for value in one.null_fraction.values())
            assert bool(one.null_fraction) == (one.null_dims is not None)
            assert one.neurons or one.note, "an absence says so"
            assert len(one.source) > 15, "a source is more than its key"


def test_a_model_is_found_by_its_id_and_by_its_name() -> None:
    for name in ("openai-community/gpt2", "gpt2", "OpenAI-Community/GPT2"):
        assert published(name).id == "openai-community/gpt2"
    with pytest.raises(SettingError, match=r"no neurons of \./gpt2.*openai-community/gpt2.*--published NAME"):
        published("./gpt2")


def test_planted_neurons_agree_and_others_do_not(profile: Profile) -> None:
    found = candidates(profile.weights)
    planted_neurons = tuple(ENTROPY_NEURONS)
    others = tuple(set(range(profile.model.n_neurons)) - set(found))
    (one,) = agreement(profile, of(profile, *planted_neurons, others[0]))
    assert one.found == planted_neurons
    assert one.by_chance == pytest.approx(len(found) * 3 / profile.model.n_neurons)
    # Over all neurons chance finds what there is to find.
    (everything,) = agreement(profile, of(profile, *range(profile.model.n_neurons)))
    assert len(everything.found) == everything.by_chance == len(found)
    assert agreement(profile, of(profile, 1, kind="token frequency")) == []


def test_neurons_of_another_layer_are_not_compared(profile: Profile) -> None:
    for other in (of(profile, 1, layer=30), of(profile, profile.model.n_neurons)):
        with pytest.raises(SettingError, match="it is not made of that model"):
            agreement(profile, other)


def test_scan_prints_the_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile) -> None:
    planted("llama").save(tmp_path)
    arguments = ("scan", tmp_path / "model", "--out", tmp_path / "scan", "--published")
    monkeypatch.setattr(module, "published_models", lambda: {"someone/model": of(profile, *ENTROPY_NEURONS)})
    output = run(*arguments, "model").output
    assert "Published neurons of someone/model" in output
    assert f"{len(ENTROPY_NEURONS)} of {len(ENTROPY_NEURONS)} are among the" in " ".join(output.split())
    assert "are in the list of published ones. It has someone/model." in run(*arguments, code=1).output
