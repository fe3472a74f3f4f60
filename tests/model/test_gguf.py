from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import confsteer
from confsteer import ConfsteerError, Profile, ProfileMismatchError
from confsteer.discovery.weights import weight_statistics
from confsteer.errors import LoadError
from confsteer.model import loading
from confsteer.model.dissect import dissect
from confsteer.model.gguf import complete_config, find
from confsteer.model.gguf_weights import NORM_OFFSET
from confsteer.model.loading import gguf_config, load_model, load_tokenizer
from confsteer.text.windows import leading_ids
from tests.model.gguf_files import ARCHITECTURES, CHAT, named, quantised, write
from tests.models import ENTROPY_NEURONS, FAMILIES, tiny_model, tiny_tokenizer
from tests.planted import planted
from tests.test_cli import run

gguf = pytest.importorskip("gguf", reason="GGUF files are read with gguf: pip install 'confsteer[gguf]'")

CONFIGS: dict[str, dict[str, Any]] = {family.model_type: dict(family.config) for family in FAMILIES}
CONFIGS["gemma2"] |= {"query_pre_attn_scalar": 8, "tie_word_embeddings": True}
CONFIGS["gemma3_text"] |= {"query_pre_attn_scalar": 8}
# Short enough to count.
CONFIGS["phi3"] |= {"sliding_window": 4}
# Only for one size of heads does transformers make a Qwen3 of a GGUF file.
CONFIGS["qwen3"] |= {"head_dim": 128}
MODEL_TYPES = ["gemma2", "gemma3_text", "gpt2", "llama", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"]
IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(5))


def tiny(model_type: str, **config: Any) -> Any:
    return tiny_model(model_type, CONFIGS[model_type] | config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def assert_weights(loaded: Any, original: Any, kind: str) -> None:
    """All are those that were written, and what was quantised is what is left of it."""
    kinds = {name: type(module).__name__ for name, module in original.named_modules()}
    offset = NORM_OFFSET[ARCHITECTURES.get(original.config.model_type, original.config.model_type)]
    for name, parameter in original.named_parameters():
        value = parameter.detach()
        if kinds[name.rpartition(".")[0]] == "Conv1D" and value.dim() == 2:
            expected = quantised(value.T.contiguous(), kind).T
        elif value.dim() == 2:
            expected = quantised(value, kind)
        else:
            expected = value + offset - offset if "norm" in name else value
        assert torch.equal(loaded.get_parameter(name), expected), name
        assert kind == "F32" or value.dim() == 1 or not torch.equal(expected, value)


def test_every_architecture_that_is_scanned_is_tested() -> None:
    assert {ARCHITECTURES.get(name, name) for name in MODEL_TYPES} == NORM_OFFSET.keys()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_file_is_the_model_it_was_written_of(model_type: str, kind: str, tmp_path: Path) -> None:
    original = tiny(model_type)
    # Phi-3's config has a padding token beyond this vocabulary.
    says = {"tokenizer.ggml.padding_token_id": 0}
    path = write(tmp_path / "tiny.gguf", original, kind=kind, pieces=model_type.startswith("gemma"), says=says)
    loaded = load_model(str(path), device="cpu").model
    assert loaded.dtype == torch.float32
    assert_weights(loaded, original, kind)
    if kind == "F32":
        assert torch.allclose(logits(loaded), logits(original), atol=1e-5)

    result = confsteer.scan(str(path))
    anatomy = dissect(loaded)
    result.profile.check_model(anatomy)
    assert result.profile.model.id == str(path)
    assert result.profile.model.fingerprints == anatomy.fingerprints()
    ours, theirs = result.profile.weights, weight_statistics(anatomy.readout(result.profile.model.tokenizer_size))
    for name, value in theirs._asdict().items():
        assert torch.equal(getattr(ours, name), value) if isinstance(value, Tensor) else getattr(ours, name) == value, name
    assert result.bytes_total == path.stat().st_size
    assert result.bytes_read < result.bytes_total


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_config_and_tokenizer_are_those_that_transformers_makes_of_the_whole_file(model_type: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny(model_type), pieces=model_type.startswith("gemma"))
    place = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": str(path)}
    file = find(str(path), None, None)
    assert file is not None
    config, theirs = gguf_config(file), AutoConfig.from_pretrained(**place)
    complete_config(theirs, file)
    assert config.to_dict() == theirs.to_dict() | {"_name_or_path": str(path)}
    tokenizer, other = load_tokenizer(str(path), file=file), AutoTokenizer.from_pretrained(**place)
    assert type(tokenizer) is type(other)
    assert tokenizer.get_vocab() == other.get_vocab()
    assert tokenizer.added_tokens_decoder == other.added_tokens_decoder


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "phi3"])
def test_weights_read_here_are_those_that_transformers_reads(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of loading, of which the other is for architectures that are not known here."""
    says = {"tokenizer.ggml.padding_token_id": 0}
    path = write(tmp_path / "tiny.gguf", tiny(model_type), kind="Q5_0", pieces=model_type == "gemma3_text", says=says)
    ours = load_model(str(path), device="cpu").model
    monkeypatch.setattr(loading, "NORM_OFFSET", {})
    theirs = load_model(str(path), device="cpu").model
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.get_parameter(name), value), name
    assert ours.config.to_dict() == {k: v for k, v in theirs.config.to_dict().items() if k != "quantization_config"}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_tied_embeddings(model_type: str, tmp_path: Path) -> None:
    original = tiny(model_type, tie_word_embeddings=True)
    path = write(tmp_path / "tiny.gguf", original, kind="Q8_0", pieces=True)
    loaded = load_model(str(path), device="cpu").model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    result = confsteer.scan(str(path))
    assert "token_embd.weight" in result.tensors
    result.profile.check_model(dissect(loaded))


def test_a_profile_of_the_quantised_file_does_not_fit_the_original_and_fits_every_load_of_the_file(tmp_path: Path) -> None:
    original = tiny("llama")
    path = write(tmp_path / "tiny.gguf", original, kind="Q8_0")
    profile = confsteer.scan(str(path)).profile
    with pytest.raises(ProfileMismatchError):
        profile.check_model(dissect(original))
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        profile.check_model(dissect(load_model(str(path), device="cpu", dtype=dtype).model))
    again = load_model(str(tmp_path), gguf_file="tiny.gguf", device="cpu").model
    profile.check_model(dissect(again))
    assert again.config.name_or_path == f"{tmp_path}/tiny.gguf"


PRE, ADDS, MODEL = "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.model"


@pytest.mark.parametrize(
    ("pieces", "says", "bos"),
    [
        (False, {ADDS: True}, True),
        (False, {ADDS: False}, False),
        (False, {}, False),
        (False, {PRE: "llama-bpe"}, True),
        (False, {PRE: "llama-bpe", ADDS: False}, False),
        (True, {}, True),
        (True, {ADDS: True}, True),
        (True, {ADDS: False}, False),
        (True, {"tokenizer.ggml.bos_token_id": None}, False),
    ],
)
def test_a_text_starts_with_bos_where_the_file_says_so_or_llama_cpp_would(
    pieces: bool, says: dict[str, Any], bos: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama"), pieces=pieces, says=says)
    tokenizer = load_model(str(path), device="cpu").tokenizer
    ids = tokenizer("abc").input_ids
    assert leading_ids(tokenizer) == ([tokenizer.bos_token_id] if bos else [])
    assert (ids[0] == tokenizer.bos_token_id) is bos
    assert ids[bos:] == tokenizer("abc", add_special_tokens=False).input_ids
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("abc").input_ids == ids


SPACE = "tokenizer.ggml.add_space_prefix"


@pytest.mark.parametrize(
    ("pieces", "says", "warns"),
    [
        (False, {PRE: "deepseek-coder"}, True),
        (False, {PRE: "smollm", SPACE: False}, False),
        (False, {PRE: "llama-bpe"}, False),
        (True, {SPACE: False}, True),
        (True, {SPACE: True, PRE: "default"}, False),
    ],
)
def test_a_tokenizer_that_does_not_obey_the_file_is_not_silent(
    pieces: bool, says: dict[str, Any], warns: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama"), pieces=pieces, says=says)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(str(path), device="cpu")
    assert any("does not obey" in str(warning.message) for warning in caught) is warns


def test_ends_and_the_chat_template_are_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama"), says={"tokenizer.ggml.eot_token_id": 7})
    model, tokenizer = load_model(str(path), device="cpu")
    assert tokenizer.eos_token_id == 0
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [0, 7]
    assert tokenizer.chat_template == CHAT


def test_what_lies_beside_the_file_and_in_the_current_folder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    write(tmp_path / "here" / "tiny.gguf", tiny_model("llama", CONFIGS["llama"], seed=1))
    tiny_tokenizer().save_pretrained(tmp_path / "there")
    original = tiny("llama")
    path = write(tmp_path / "there" / "tiny.gguf", original)
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_model(str(path), device="cpu")
    assert torch.allclose(logits(loaded.model), logits(original), atol=1e-5)
    assert loaded.tokenizer("abc").input_ids == [94, 67]
    # A name in the current folder is one too.
    assert load_model("tiny.gguf", device="cpu").model.config.name_or_path == "tiny.gguf"


def test_a_file_of_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    repository = tmp_path / "cache" / "models--someone--tiny-GGUF"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    write(repository / "snapshots" / commit / "tiny.Q8_0.gguf", tiny("llama"), kind="Q8_0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    profile = confsteer.scan("someone/tiny-GGUF", gguf_file="tiny.Q8_0.gguf").profile
    assert (profile.model.id, profile.model.revision) == ("someone/tiny-GGUF/tiny.Q8_0.gguf", commit)
    loaded = load_model("someone/tiny-GGUF", gguf_file="tiny.Q8_0.gguf", device="cpu").model
    assert (loaded.config.name_or_path, loaded.config._commit_hash) == (profile.model.id, commit)
    profile.check_model(dissect(loaded))
    with pytest.raises(LoadError, match=r"cannot find other\.gguf in someone/tiny-GGUF"):
        load_model("someone/tiny-GGUF", gguf_file="other.gguf")
    for read in (load_model, confsteer.scan):
        with pytest.raises(LoadError, match="name it with --gguf FILE"):
            read("someone/tiny-GGUF")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


def test_the_rotation_is_scaled_as_the_file_says(tmp_path: Path) -> None:
    """transformers reads neither Llama 3's factors nor a linear scaling."""
    original = tiny("llama", rope_parameters=LLAMA3, head_dim=32)
    base = 5e5 ** (-torch.arange(0, 32, 2) / 32)
    factors = base / original.model.rotary_emb.inv_freq
    assert factors.max() > 1
    path = write(tmp_path / "llama3.gguf", original, more={"rope_freqs.weight": factors})
    loaded = load_model(str(path), device="cpu").model
    assert loaded.config.rope_parameters == LLAMA3
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    with pytest.raises(LoadError, match="otherwise than Llama 3"):
        load_model(str(write(tmp_path / "else.gguf", original, more={"rope_freqs.weight": factors**2})))

    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    original = tiny("gemma3_text", rope_parameters={"full_attention": linear, "sliding_attention": local}, **kinds)
    says = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    loaded = load_model(str(write(tmp_path / "gemma.gguf", original, pieces=True, says=says)), device="cpu").model
    assert loaded.config.rope_parameters == original.config.rope_parameters


@pytest.mark.parametrize(
    ("model_type", "says", "more", "reason"),
    [
        ("llama", {"llama.rope.scaling.type": "yarn"}, {}, "scales its rotation by yarn"),
        ("llama", {}, {"rope_factors_long.weight": torch.ones(4)}, "scales its rotation by rope_factors_long"),
        ("starcoder2", {"starcoder2.rope.freq_base": 999999.4}, {}, r"starcoder2\.rope\.freq_base = 999999"),
        ("llama", {}, {"blk.0.attn_q.bias": torch.ones(32)}, "it would compute something else"),
        ("llama", {}, {"blk.1.ffn_up.weight": None}, "lacks 1 of its weights"),
        ("llama", {"general.architecture": "granite"}, {}, "whose architecture is granite"),
        ("llama", {"split.count": 2}, {}, "one part of a split model"),
    ],
)
def test_what_would_be_another_model_is_refused(
    model_type: str, says: dict[str, Any], more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", tiny(model_type), says=says, more=more)
    with pytest.raises(LoadError, match=reason):
        load_model(str(path))


def test_an_architecture_whose_norms_are_not_known_is_not_scanned(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama"), says={"general.architecture": "nemotron"})
    with pytest.raises(LoadError, match=r"nemotron.*run confsteer calibrate"):
        confsteer.scan(str(path))


def test_a_file_cut_anywhere_is_a_sentence(tmp_path: Path) -> None:
    whole = write(tmp_path / "tiny.gguf", tiny("llama")).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 20, *range(24, len(whole) - 1, len(whole) // 150), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(LoadError, match=r"is truncated|not a GGUF file|cannot read"):
            load_model(str(cut))


def test_a_file_with_wrong_bytes_loads_or_is_a_sentence(tmp_path: Path) -> None:
    whole = write(tmp_path / "tiny.gguf", tiny("llama")).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for position in range(4, 5000, 97):
        damaged.write_bytes(whole[:position] + b"\xff\xff\xff\xff" + whole[position + 4 :])
        try:
            confsteer.scan(str(damaged))
        except ConfsteerError as error:
            assert len(str(error)) < 800


def test_other_files_are_sentences(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny-00001-of-00002.gguf", tiny("llama"))
    with pytest.raises(LoadError, match="one part of a split model"):
        load_model(str(path))
    (tmp_path / "text.gguf").write_text("Once upon a time")
    with pytest.raises(LoadError, match="is not a GGUF file"):
        load_model(str(tmp_path / "text.gguf"))
    with pytest.raises(LoadError, match="there is no file"):
        confsteer.scan(str(tmp_path / "none.gguf"))
    with pytest.raises(LoadError, match=r"cannot find none\.gguf"):
        load_model(str(tmp_path), gguf_file="none.gguf")
    with pytest.raises(LoadError, match="of which model"):
        load_model(None, gguf_file="tiny.gguf")
    with pytest.raises(LoadError, match="is a GGUF file itself"):
        load_model(str(path), gguf_file="tiny.gguf")
    old = path.read_bytes()
    (tmp_path / "old.gguf").write_bytes(old[:4] + b"\x01" + old[5:])
    with pytest.raises(LoadError, match="GGUF of version 1"):
        load_model(str(tmp_path / "old.gguf"))


def test_without_gguf_both_interfaces_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf", tiny("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoadError, match=r"this needs gguf: pip install 'confsteer\[gguf\]'"):
        load_model(str(path))
    assert "this needs gguf: pip install 'confsteer[gguf]'" in run("scan", path, code=1).output


def test_commands_take_a_file(tmp_path: Path) -> None:
    """A planted model: its neurons are found in the file, steered and baked."""
    found = planted("llama")
    path = write(tmp_path / "planted.gguf", found.model, says={ADDS: True})
    # Its tokens are the file's letters.
    ids = [[int(word[1:]) for word in text.split()] for text in found.texts]
    (tmp_path / "text.json").write_text(json.dumps(["".join(chr(32 + i) for i in row if i < 94) for row in ids]))

    run("scan", path, "--out", tmp_path / "scan")
    run("calibrate", path, "--text", tmp_path / "text.json", "--window", 64, "--out", tmp_path / "profile")
    profile = Profile.load(tmp_path / "profile")
    assert profile.model.id == str(path)
    assert ENTROPY_NEURONS.items() <= {n.index: n.sign for n in profile.entropy_neurons}.items()
    profile.check_model(dissect(found.model))
    options = ("-p", tmp_path / "profile", "-s", "entropy=0.1")
    text = ("--text", tmp_path / "text.json", "--window", 64)
    run("generate", "abc", tmp_path, "--gguf", "planted.gguf", *options, "--max-new-tokens", 4)
    run("eval", path, *options, *text)
    run("tune", path, "-p", tmp_path / "profile", *text, "--out", tmp_path / "tuned", "--no-leave-one-out")
    run("study", "cumulative", path, "-p", tmp_path / "profile", *text, "--repeats", 2)
    run("bake", path, *options, "--out", tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    with confsteer.steer(found.model, profile, entropy=0.1):
        expected = logits(found.model)
    assert torch.allclose(logits(baked), expected, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "baked")("abc").input_ids == [0, 94, 67]


def test_names_of_tensors_are_those_of_the_format() -> None:
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.1.ffn_down.weight"} <= named(tiny("llama")).keys()
