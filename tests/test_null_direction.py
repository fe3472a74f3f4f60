"""A dial made by hand: a constant along the direction that the unembedding reads least, in models without entropy neurons."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import confsteer
from confsteer import (
    NoNeuronsError,
    Profile,
    ProfileCorruptError,
    SettingError,
    Steering,
    SteeringError,
)
from confsteer.evaluation.reader import Reader
from confsteer.model.dissect import dissect
from confsteer.model.locate import locate
from confsteer.playground.description import describe
from confsteer.profile.hub import card
from confsteer.profile.store import FILE_NAME
from confsteer.report.columns import TableConsole
from confsteer.report.plots import plot_response
from confsteer.report.tables import print_profile
from confsteer.runtimes.llamacpp.adapters import export
from confsteer.text.windows import make_windows
from confsteer.tuning.parameters import DialParameters, parameters_of
from tests.mixtures import MIXTURES, tiny_mixture
from tests.models import FAMILIES, tiny_model, tiny_tokenizer, zipf_texts
from tests.paths import STORIES, STORIES_TEXT
from tests.planted import Planted, planted
from tests.runtimes.llamacpp.test_export import as_llama_cpp_does, on_disk

IDS = torch.randint(1, 96, (4, 10), generator=torch.Generator().manual_seed(5))
MIXTURE = MIXTURES[0].model_type
EVERY = ["gpt2", "llama", "gemma2", "granite", MIXTURE]
"""A LayerNorm; an RMSNorm; a norm on the MLP's output and a softcap; a factor on it; a mixture of experts."""


@functools.cache
def by_hand(model_type: str) -> Planted:
    """A random model, which has no entropy neurons, with its dial. Tests must leave the model as they found it."""
    if model_type == MIXTURE:
        model = tiny_mixture(MIXTURE).eval()
    else:
        model = tiny_model(model_type, next(family.config for family in FAMILIES if family.model_type == model_type))
    texts, tokenizer = zipf_texts(8, 80), tiny_tokenizer()
    profile = confsteer.calibrate(model, tokenizer, texts, window=64, source="zipf", null_direction=True)
    return Planted(model, tokenizer, texts, profile)


@functools.cache
def with_neurons() -> Planted:
    """The planted Llama, whose entropy neurons are found, with a dial that turns none of them."""
    model, tokenizer, texts, _ = planted("llama")
    profile = confsteer.calibrate(model, tokenizer, texts, window=64, source="zipf", null_direction=True)
    return Planted(model, tokenizer, texts, profile)


def log_probabilities(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.log_softmax(-1)


def naive(found: Planted, constant: Tensor, run: Callable[[nn.Module], Tensor] = log_probabilities) -> Tensor:
    """The model with a constant ``[d_model]``, or one for each row and position, added before its final norm."""
    model = copy.deepcopy(found.model)
    locate(model).final_norm.register_forward_pre_hook(lambda module, args: (args[0] + constant, *args[1:]))
    return run(model)


def constants(found: Planted, steerings: Sequence[Steering]) -> Tensor:
    """What each steering's dial adds, by the profile's curve, ``[steerings, d_model]``."""
    direction = found.profile.null_direction
    assert direction is not None
    positions = [0.0 if s.entropy is None else found.profile.dial_position("entropy", s.entropy) for s in steerings]
    return torch.tensor(positions)[:, None] * direction.push * found.profile.columns["null_direction"]


def mean_entropy(found: Planted, model: nn.Module) -> float:
    total, n = 0.0, 0
    for batch in make_windows(found.texts, found.tokenizer, window=64).batches(16):
        log_p = log_probabilities(model, batch.input_ids)[batch.kept].double()
        total, n = total - float((log_p.exp() * log_p).sum()), n + len(log_p)
    return total / n


@pytest.mark.parametrize("model_type", EVERY)
def test_the_direction_is_the_one_that_the_logits_notice_least(model_type: str) -> None:
    found = by_hand(model_type)
    direction, vector = found.profile.null_direction, found.profile.columns["null_direction"].double()
    assert direction is not None
    readout = dissect(found.model).readout()
    values = torch.linalg.svdvals(readout.unembedding.double())
    # A LayerNorm removes one more direction, which is none of the unembedding's.
    smallest = float(values[-2 if readout.centred else -1])
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    assert float((readout.unembedding.double() @ vector).norm()) == pytest.approx(smallest, rel=1e-4)
    assert direction.singular_value == pytest.approx(smallest, rel=1e-4)
    assert found.profile.entropy_neurons == ()


@pytest.mark.parametrize("model_type", EVERY)
def test_the_curve_is_what_the_model_does_with_the_constant(model_type: str) -> None:
    found = by_hand(model_type)
    curve, direction = found.profile.response["entropy"], found.profile.null_direction
    assert direction is not None
    for index in (0, curve.zero + 3, len(curve.position) - 1):
        constant = curve.position[index] * direction.push * found.profile.columns["null_direction"]
        assert naive(found, constant, lambda m: torch.tensor(mean_entropy(found, m))).item() == pytest.approx(
            curve.entropy[index], rel=1e-5
        )
    assert curve.change("entropy")[curve.zero + 1] > 0
    assert found.profile.reach("entropy")[1] > 0.15


@pytest.mark.parametrize("model_type", EVERY)
def test_steering_adds_the_constant(model_type: str) -> None:
    found = by_hand(model_type)
    unsteered = log_probabilities(found.model)
    low, high = found.profile.reach("entropy")
    steerings = [Steering(entropy=0.9 * high), Steering(entropy=0.5 * low)]
    by_itself = [naive(found, constant) for constant in constants(found, steerings)]
    with confsteer.steer(found.model, found.profile) as steerer:
        assert torch.equal(log_probabilities(found.model), unsteered)
        for steering, expected in zip(steerings, by_itself, strict=True):
            steerer.update(steering)
            torch.testing.assert_close(log_probabilities(found.model), expected, atol=1e-5, rtol=0)
    assert torch.equal(log_probabilities(found.model), unsteered)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in found.model.modules())


@pytest.mark.parametrize("model_type", ["gemma2", MIXTURE])
def test_rows_have_their_own_and_prompts_are_left_alone_if_asked(model_type: str) -> None:
    found = by_hand(model_type)
    rows = [Steering(entropy=0.3, positions="generated"), Steering(positions="generated")] * 2
    constant = torch.zeros(*IDS.shape, found.profile.model.d_model)
    constant[:, -1] = constants(found, rows)
    with confsteer.steer(found.model, found.profile, rows):
        steered = log_probabilities(found.model)
    torch.testing.assert_close(steered, naive(found, constant), atol=1e-5, rtol=0)


def test_neurons_that_are_found_are_steered_beside_the_dial_and_not_by_it() -> None:
    found = with_neurons()
    assert found.profile.entropy_neurons == planted("llama").profile.entropy_neurons
    assert found.profile.response["unigram"] == planted("llama").profile.response["unigram"]
    assert (found.profile.edit(Steering(entropy=0.2)).bias == 0).all()
    of_neurons = Steering(scale={"entropy": 0.0, 20: 2.0}, shift={5: 0.3})
    with confsteer.steer(found.model, planted("llama").profile, of_neurons):
        constant = constants(found, [Steering(entropy=0.2)])[0]
        hook = locate(found.model).final_norm.register_forward_pre_hook(lambda m, args: (args[0] + constant, *args[1:]))
        expected = log_probabilities(found.model)
        hook.remove()
    with confsteer.steer(found.model, found.profile, of_neurons.model_copy(update={"entropy": 0.2})):
        torch.testing.assert_close(log_probabilities(found.model), expected, atol=1e-5, rtol=0)


def test_a_final_norm_that_is_not_reached_is_an_error() -> None:
    found = by_hand("llama")
    model = copy.deepcopy(found.model)
    with confsteer.steer(model, found.profile, entropy=0.3):
        model.model.norm = copy.deepcopy(found.model.model.norm)
        with pytest.raises(SteeringError, match="nothing was steered"):
            log_probabilities(model)


def test_compiled_code_follows_update() -> None:
    found = by_hand("gemma2")
    expected = naive(found, constants(found, [Steering(entropy=0.4)])[0])
    torch._dynamo.reset()
    with confsteer.steer(found.model, found.profile) as steerer:
        compiled: Any = torch.compile(found.model, backend="eager")
        log_probabilities(compiled)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        steerer.update(entropy=0.4)
        torch.testing.assert_close(log_probabilities(compiled), expected, atol=1e-5, rtol=0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", MIXTURE])
def test_an_evaluation_scores_what_the_steered_model_says(model_type: str) -> None:
    found = by_hand(model_type)
    windows = make_windows(found.texts[:2], found.tokenizer, window=64)
    text = Reader(found.model, found.profile).read(windows)
    scores = text.scores(found.profile.intervention(Steering(entropy=0.3)))
    with confsteer.steer(found.model, found.profile, entropy=0.3):
        parts = [log_probabilities(found.model, batch.input_ids)[batch.kept] for batch in windows.batches(16)]
    log_p = torch.cat(parts)
    torch.testing.assert_close(scores.entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-4, rtol=0)


def test_tuning_turns_the_dial_and_refuses_gains() -> None:
    for profile in (by_hand("gemma2").profile, with_neurons().profile):
        ways = parameters_of(profile, "dials")
        assert isinstance(ways, DialParameters)
        at = torch.linspace(0.2, 0.1, ways.number)
        ours, stored = ways.intervention(at), profile.intervention(ways.steering(at))
        assert float(ours.null_write) > 0
        for mine, theirs in zip(ours, stored, strict=True):
            torch.testing.assert_close(mine.float(), theirs.float(), atol=1e-4, rtol=1e-4)
        with pytest.raises(SettingError, match=r"has no gain to tune\. Tune the dials: --dials"):
            parameters_of(profile, "neurons")
    found = by_hand("gemma2")
    tuned = confsteer.tune(found.model, found.tokenizer, zipf_texts(20, 60), found.profile, window=64, parameters="dials")
    assert tuned.steering.entropy is not None


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "granite"])
def test_a_bias_holds_the_constant(model_type: str) -> None:
    found = by_hand(model_type)
    model = copy.deepcopy(found.model)
    assert confsteer.bake(model, found.profile, "entropy=0.15").weight is None
    with confsteer.steer(found.model, found.profile, entropy=0.15):
        torch.testing.assert_close(log_probabilities(model), log_probabilities(found.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "error", "why"),
    [
        ("gemma2", SteeringError, "no weight adds a constant there: a norm on the MLP's output"),
        ("qwen2", SteeringError, "has no bias to hold it. Steer while the model runs"),
        (MIXTURE, SteeringError, "or an expert's routing weight, would change it"),
    ],
)
def test_a_model_without_a_place_for_the_constant_is_not_baked(model_type: str, error: type[Exception], why: str) -> None:
    found = by_hand(model_type)
    with pytest.raises(error, match=why):
        confsteer.bake(copy.deepcopy(found.model), found.profile, "entropy=0.3")


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_constant_is_a_control_vector_behind_a_norm_too(model_type: str, tmp_path: Path) -> None:
    found = by_hand(model_type)
    file = tmp_path / "dial.gguf"
    exported = export(Steering(entropy=0.3), found.profile, on_disk(found, tmp_path / "model"), control_vector=file)
    with confsteer.steer(found.model, found.profile, entropy=0.3):
        expected = log_probabilities(found.model, torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(5)))
    ours = as_llama_cpp_does(found.model, file, None, layer=exported.parts.layer)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_what_has_no_meaning_for_a_constant_is_refused() -> None:
    found = by_hand("llama")
    for request in ("shift.null=1", "scale.null=0", "clamp.null=:2"):
        with pytest.raises(SteeringError, match=r"a null direction is no neuron.*turn it with entropy=NATS"):
            confsteer.steer(found.model, found.profile, request).__enter__()
    with pytest.raises(SteeringError, match="which has none, but a null direction for its entropy dial"):
        found.profile.edit(Steering(scale={"entropy": 0.0}))
    with pytest.raises(SteeringError, match=r"entropy=.* is out of reach"):
        found.profile.intervention(Steering(entropy=50.0))
    with pytest.raises(NoNeuronsError, match="no entropy neurons"):
        found.profile.found("entropy")


def test_whoever_reads_of_the_dial_reads_that_it_is_made_by_hand() -> None:
    profile = by_hand("gemma2").profile
    console = TableConsole(width=150, record=True, file=None, quiet=False)
    with console.capture() as shown:
        print_profile(console, profile)
    assert "Null direction, made by hand (entropy dial:" in shown.get()
    assert "## Null direction, made by hand (entropy dial:" in card(profile, "a/b")
    dial = describe(profile)["dials"]["entropy"]
    assert (dial["turns"], dial["neurons"]) == ("null direction, made by hand", [])
    assert "null direction, made by hand" in plot_response(profile).axes[0].get_title()
    # Neurons that were found are said to be, and not to be on it.
    found = with_neurons().profile
    with console.capture() as shown:
        print_profile(console, found)
    assert "Entropy neurons (found, but not on the entropy dial)" in shown.get()
    assert describe(found)["dials"]["entropy"]["neurons"] == []
    assert "turns" not in describe(found)["dials"]["unigram"]


def test_a_profile_comes_back_from_disk_in_a_format_of_its_own(tmp_path: Path) -> None:
    for number, found in enumerate((by_hand("gemma2"), by_hand(MIXTURE), with_neurons())):
        found.profile.save(tmp_path / str(number))
        loaded = Profile.load(tmp_path / str(number))
        assert loaded == found.profile
        assert torch.equal(loaded.columns["null_direction"], found.profile.columns["null_direction"])
        assert json.loads((tmp_path / str(number) / FILE_NAME).read_text())["format_version"] == 3
    # Others are written as ever, and older releases read them.
    planted("llama").profile.save(tmp_path / "old")
    document = json.loads((tmp_path / "old" / FILE_NAME).read_text())
    assert document["format_version"] == 1
    assert "null_direction" not in document


@pytest.mark.parametrize(
    "vector",
    [None, torch.ones(31), torch.ones(32), torch.zeros(32), torch.full((32,), torch.nan), torch.ones(1, 32) / 32**0.5],
    ids=["none", "short", "long", "nothing", "nan", "matrix"],
)
def test_a_vector_that_is_none_is_refused(vector: Tensor | None, tmp_path: Path) -> None:
    profile = by_hand("llama").profile
    fields = {name: getattr(profile, name) for name in Profile.model_fields if name != "columns_file"}
    columns = {name: column for name, column in profile.columns.items() if name != "null_direction"}
    Profile.create(columns=columns | ({} if vector is None else {"null_direction": vector}), **fields).save(tmp_path)
    with pytest.raises(ProfileCorruptError, match="null_direction"):
        Profile.load(tmp_path)


def test_a_direction_needs_its_response_and_numbers_that_can_be() -> None:
    profile = by_hand("llama").profile
    direction = profile.null_direction
    assert direction is not None
    fields = {name: getattr(profile, name) for name in Profile.model_fields}
    for changed, why in (
        ({"response": {}}, "if and only if it has neurons with a sign, or a null direction"),
        ({"null_direction": None}, "if and only if it has neurons with a sign, or a null direction"),
        ({"null_direction": direction.model_dump() | {"push": 0.0}}, "greater than 0"),
        ({"null_direction": direction.model_dump() | {"singular_value": -1.0}}, "greater than or equal to 0"),
    ):
        with pytest.raises(ValidationError, match=why):
            Profile(**fields | changed)


def test_a_preset_that_turns_a_dial_the_profile_has_not_is_refused_as_one() -> None:
    profile = by_hand("llama").profile
    fields = {name: getattr(profile, name) for name in Profile.model_fields}
    with pytest.raises(ValidationError, match="no token-frequency neurons"):
        Profile(**fields | {"presets": {"calm": Steering(unigram=0.1)}})
    with pytest.raises(ValidationError, match="out of reach"):
        Profile(**fields | {"presets": {"calm": Steering(entropy=50.0)}})


def test_a_calibration_with_another_kind_of_dial_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, texts, _ = by_hand("llama")
    monkeypatch.setattr("confsteer.calibration.progress.WRITE_INTERVAL_SECONDS", 0.0)

    def calibrate(**settings: Any) -> Profile:
        return confsteer.calibrate(
            model, tokenizer, texts, window=64, source="zipf", checkpoint=tmp_path / "progress", **settings
        )

    assert calibrate(null_direction=True) == by_hand("llama").profile
    assert calibrate(null_direction=True, resume=True) == by_hand("llama").profile
    with pytest.raises(confsteer.ResumeError):
        calibrate(resume=True)


def test_a_quantised_model_has_the_dial() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(by_hand("llama").model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    found = by_hand("llama")._replace(model=model)
    profile = confsteer.calibrate(model, found.tokenizer, found.texts, window=64, null_direction=True)
    unsteered = mean_entropy(found, model)
    with confsteer.steer(model, profile, entropy=0.3):
        assert mean_entropy(found, model) - unsteered == pytest.approx(0.3, rel=0.03)


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not here")
def test_stories260k_gets_a_dial_that_does_what_it_is_asked_on_other_text() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    stories = json.loads(STORIES_TEXT.read_text())
    profile = confsteer.calibrate(model, tokenizer, stories[:20], tokens=1_000, null_direction=True)
    assert profile.entropy_neurons == ()
    text = Reader(model, profile).read(make_windows(stories[20:40], tokenizer, max_tokens=4_000))
    unsteered = text.scores(profile.intervention(Steering())).entropy.mean()
    for asked in (-0.05, 0.3):
        change = text.scores(profile.intervention(Steering(entropy=asked))).entropy.mean() - unsteered
        assert float(change) == pytest.approx(asked, rel=0.2)
