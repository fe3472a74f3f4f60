from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

import confsteer
from confsteer import ConfsteerError, NoNeuronsError, Profile, ProfileMismatchError, UnsupportedModelError
from confsteer.calibration.scan import scan
from confsteer.cli.options import EXIT_NO_NEURONS
from confsteer.discovery.select import candidates
from confsteer.discovery.weights import WeightStatistics, weight_statistics
from confsteer.model.dissect import dissect
from confsteer.profile.hub import card
from confsteer.profile.store import WEIGHT_COLUMNS
from tests.models import ENTROPY_NEURONS, FAMILIES, NULL_DIMS, TinyFamily, tiny_model, tiny_tokenizer
from tests.planted import planted
from tests.test_cli import run

CONFIGS = {family.model_type: family.config for family in FAMILIES}


def saved(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def assert_equal(ours: WeightStatistics, theirs: WeightStatistics) -> None:
    """Bit for bit."""
    for name, value in theirs._asdict().items():
        mine = getattr(ours, name)
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


def assert_scan_is_of_the_loaded_model(folder: Path) -> None:
    profile = scan(str(folder)).profile
    anatomy = dissect(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    profile.check_model(anatomy)
    assert profile.model.fingerprints == anatomy.fingerprints()
    assert_equal(profile.weights, weight_statistics(anatomy.readout(profile.model.tokenizer_size)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_scan_equals_the_statistics_of_the_loaded_model(family: TinyFamily, tmp_path: Path) -> None:
    assert_scan_is_of_the_loaded_model(saved(tmp_path, tiny_model(*family)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_tied_and_sharded_checkpoints_of_every_precision(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(model_type, CONFIGS[model_type] | {"tie_word_embeddings": True}).to(dtype)
    folder = saved(tmp_path, model, max_shard_size="10KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in weight_map, "the embedding stands for the unembedding"
    assert_scan_is_of_the_loaded_model(folder)
    assert scan(str(folder)).profile.model.dtype == str(dtype).removeprefix("torch.")


def test_a_family_that_is_not_in_the_table_is_searched(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt_bigcode", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    assert_scan_is_of_the_loaded_model(saved(tmp_path, AutoModelForCausalLM.from_config(config)))


def test_a_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As GPT-2 on the hub: ``h.1.mlp.c_proj.weight``, and no unembedding."""
    folder = saved(tmp_path, tiny_model("gpt2", CONFIGS["gpt2"] | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    result = scan(str(folder))
    assert set(result.tensors) == {"wte.weight", "ln_f.weight", "ln_f.bias", "h.1.mlp.c_proj.weight"}
    assert_scan_is_of_the_loaded_model(folder)


def test_rows_that_the_tokenizer_has_no_id_for_are_left_out(tmp_path: Path) -> None:
    model = tiny_model("llama", CONFIGS["llama"])
    folder = saved(tmp_path, model)
    whole = scan(str(folder)).profile
    model.resize_token_embeddings(96 + 32)
    with torch.no_grad():
        model.lm_head.weight[96:] = 100.0
    padded = scan(str(saved(tmp_path / "padded", model))).profile
    assert (padded.model.tokenizer_size, padded.model.vocab_size) == (96, 128)
    assert_equal(padded.weights, whole.weights)


def test_only_the_tensors_needed_are_read(tmp_path: Path) -> None:
    """The files that hold none of them may as well be missing, or something else."""
    folder = saved(tmp_path, tiny_model("llama", CONFIGS["llama"]), max_shard_size="10KB")
    before = scan(str(folder))
    assert set(before.tensors) == {"lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"}
    assert before.bytes_read == 4 * (96 * 32 + 32 + 64 * 32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert before.bytes_total == index["metadata"]["total_size"]
    needed = {index["weight_map"][name] for name in before.tensors}
    others = sorted(set(index["weight_map"].values()) - needed)
    (folder / others[0]).write_bytes(b"something else")
    for name in others[1:]:
        (folder / name).unlink()
    assert scan(str(folder)).profile == before.profile


def test_planted_entropy_neurons_are_the_candidates(tmp_path: Path) -> None:
    for model_type in ("gpt2", "llama"):
        found = planted(model_type)
        profile = scan(str(saved(tmp_path / model_type, found.model)), null_dims=NULL_DIMS - (model_type == "gpt2")).profile
        assert set(candidates(profile.weights)[: len(ENTROPY_NEURONS)]) == set(ENTROPY_NEURONS)
        assert profile.weights.null_fraction[list(ENTROPY_NEURONS)].min() > 0.999


def test_candidates_come_in_the_order_of_their_write_into_the_null_space() -> None:
    """And each criterion is needed: neuron 3 has a high logit variance, neuron 4 a null fraction that chance reaches."""
    n = 40
    weights = WeightStatistics(
        norm=torch.ones(n, dtype=torch.float64).index_fill(0, torch.tensor([1]), 3.0),
        logit_variance=torch.ones(n, dtype=torch.float64).index_fill(0, torch.tensor([0, 1, 2, 4]), 0.1),
        null_fraction=torch.full((n,), 0.2, dtype=torch.float64),
        singular_values=torch.ones(8, dtype=torch.float64),
        null_dims=2,
        chance_null_fraction=0.5,
    )
    weights.null_fraction[:5] = torch.tensor([0.7, 0.6, 0.9, 0.9, 0.5])
    assert candidates(weights) == [1, 2, 0]


def test_calibration_measures_what_a_scan_reads(tmp_path: Path) -> None:
    found = planted("llama")
    profile = scan(str(saved(tmp_path, found.model))).profile
    assert_equal(profile.weights, found.profile.weights)
    assert profile.layer.cliff is None  # its null space is exact
    beyond = scan(str(tmp_path), null_dims=NULL_DIMS + 2).profile
    values = beyond.weights.singular_values
    assert beyond.layer.cliff == values[NULL_DIMS + 2] / values[NULL_DIMS + 1]


@pytest.fixture
def scanned(tmp_path: Path) -> Profile:
    return scan(str(saved(tmp_path / "model", planted("llama").model))).profile


def test_a_profile_of_weights_alone_survives_the_disk(scanned: Profile, tmp_path: Path) -> None:
    loaded = Profile.load(scanned.save(tmp_path / "p"))
    assert loaded == scanned
    assert set(loaded.columns) == set(WEIGHT_COLUMNS)
    assert_equal(loaded.weights, scanned.weights)


def test_a_profile_of_weights_alone_does_not_steer(scanned: Profile) -> None:
    model, sentence = planted("llama").model, r"a scan of its weights alone.* Run confsteer calibrate on the model"
    with pytest.raises(NoNeuronsError, match=sentence), confsteer.steer(model, scanned):
        pass
    for refused in (lambda: scanned.reach("entropy"), lambda: card(scanned, "a/b")):
        with pytest.raises(NoNeuronsError, match=sentence):
            refused()
    with pytest.raises(ProfileMismatchError, match="other weights"):
        scanned.check_model(dissect(tiny_model("llama", CONFIGS["llama"])))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("layer", r"layer\.entropy must be given if and only if there is a corpus"),
        ("entropy_neurons", "neurons are measured on a corpus"),
    ],
)
def test_a_profile_has_a_corpus_or_nothing_that_needs_one(scanned: Profile, part: str, sentence: str) -> None:
    calibrated = planted("llama").profile
    fields = {name: getattr(scanned, name) for name in Profile.model_fields if name != "columns_file"}
    if part == "layer":
        fields["layer"] = scanned.layer.model_copy(update={"entropy": 1.0})
    else:
        fields |= {name: getattr(calibrated, name) for name in ("entropy_neurons", "frequency_neurons", "response")}
    with pytest.raises(ValueError, match=sentence):
        Profile.create(columns=scanned.columns, **fields)


def damaged(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "pickled":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "index":
        file.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weights": []}')
    elif how == "shard":
        tensors = load_file(file)
        file.unlink()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, "gone.safetensors")})
        )
    elif how == "config":
        (folder / "config.json").unlink()
    elif how == "tokenizer":
        for tokenizer_file in folder.glob("tokenizer*"):
            tokenizer_file.unlink()
    else:
        tensors = load_file(file)
        if how == "missing":
            del tensors[name]
        elif how == "shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        else:
            tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("pickled", r"has no model\.safetensors .* to unpickle one is to run its code"),
        ("truncated", "is not a whole safetensors file"),
        ("index", "is not an index of safetensors files"),
        ("shard", r"cannot read gone\.safetensors"),
        ("config", "cannot load"),
        ("tokenizer", "cannot load"),
        ("missing", r"has no tensor for model\.layers\.1\.mlp\.down_proj\.weight"),
        ("shape", r"is float32 \[32, 63\]; it should be \[32, 64\]"),
        ("quantised", r"is int8 \[32, 64\]; .* scan the one it was made from"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(how: str, sentence: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_model("llama", CONFIGS["llama"]))
    damaged(folder, how)
    with pytest.raises(ConfsteerError, match=sentence) as caught:
        scan(str(folder))
    assert "\n" not in str(caught.value)


def test_nothing_there_is_a_sentence() -> None:
    with pytest.raises(ConfsteerError, match="cannot load nobody/nothing"):
        scan("nobody/nothing")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=96, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="t5 cannot be laid out as a causal language model"):
        scan(str(tmp_path))


def test_a_model_that_needs_its_weights_to_run_is_refused_with_what_loads_them(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_model("jetmoe", CONFIGS["llama"] | {"num_local_experts": 2, "kv_channels": 8}))
    with pytest.raises(UnsupportedModelError, match=r"cannot be laid out without its weights .* Try confsteer calibrate"):
        scan(str(folder))


def test_a_repository_in_the_hubs_cache_is_read_without_the_shards_that_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", tiny_model("llama", CONFIGS["llama"]), max_shard_size="10KB")
    expected = scan(str(folder))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    for shard in set(weight_map.values()) - {weight_map[name] for name in expected.tensors}:
        (repository / "snapshots" / commit / shard).unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    profile = scan("someone/tiny").profile
    assert (profile.model.id, profile.model.revision) == ("someone/tiny", commit)
    assert_equal(profile.weights, expected.profile.weights)


def test_the_command_prints_saves_and_draws(tmp_path: Path) -> None:
    result = run("scan", "--out", tmp_path / "p", "--plot", tmp_path / "scan.png")
    output = " ".join(result.output.split())
    profile = Profile.load(tmp_path / "p")
    assert profile.model.id == "confsteer-demo"
    for neuron in Profile.load("confsteer-demo").entropy_neurons:
        assert f"3.{neuron.index} " in output
    assert "Spectrum of W_U: 7 of 191 singular values" in output
    assert "of the checkpoint" in output
    shown = run("show", tmp_path / "p", "--plot", tmp_path / "show.png")
    assert "scanned by their weights alone" in " ".join(shown.output.split())
    assert (tmp_path / "scan.png").read_bytes() == (tmp_path / "show.png").read_bytes()
    assert "Run confsteer calibrate" in run("show", tmp_path / "p", "--response", tmp_path / "r.png", code=1).output
    assert "Run confsteer calibrate" in run("generate", "a", "-p", tmp_path / "p", code=1).output


def test_the_command_says_so_when_there_is_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny_model("llama", CONFIGS["llama"]))
    result = run("scan", folder, "--out", tmp_path / "p", code=EXIT_NO_NEURONS)
    assert "Candidates for entropy neurons: none found." in result.output
    assert candidates(Profile.load(tmp_path / "p").weights) == []
    bad = run("scan", folder, "--null-dims", 99, "--out", tmp_path / "q", code=1)
    assert "must be between 1 and 31" in " ".join(bad.output.split())
    assert not (tmp_path / "q").exists()
