"""llama.cpp with what is written for it, against transformers with the same steering."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

import confsteer
from confsteer import Profile, Steering
from confsteer.model.checkpoint import LastLayer, read_last_layer
from confsteer.model.gguf_weights import NORM_OFFSET
from confsteer.model.loading import DEMO, load_model
from confsteer.model.locate import locate
from confsteer.runtimes.llamacpp.adapters import export
from confsteer.runtimes.llamacpp.baking import READ_A_BIAS, bake_file
from confsteer.text.windows import prompt_ids
from tests.model import gguf_files
from tests.models import FAMILIES, tiny_model
from tests.paths import ROOT
from tests.planted import planted
from tests.runtimes.llamacpp.library import VARIABLE, VERSION, Llama, folder
from tests.runtimes.llamacpp.test_export import steerings
from tests.test_real import FILE

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(
        folder() is None,
        reason=f"{VARIABLE} names no folder: pip download --no-deps xllamacpp=={VERSION}, unpack the wheel and name its folder",
    ),
]
IDS = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()
EXACT = {"llama": 2e-5, "qwen2": 2e-5, "phi3": 2e-5, "gpt2": 2e-2}
"""Family -> largest difference of a log-probability; llama.cpp looks up GPT-2's GELU in a table of float16."""


def transformers(model: nn.Module, profile: Profile, steering: Steering, ids: list[int]) -> Tensor:
    with torch.no_grad(), confsteer.steer(model, profile, steering):
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("model_type", EXACT)
def test_it_computes_what_steering_does(model_type: str, tmp_path: Path) -> None:
    found = planted(model_type)
    model = gguf_files.write(tmp_path / "model.gguf", found.model)
    found.model.save_pretrained(tmp_path / "model")
    last = read_last_layer(str(tmp_path / "model"))
    with Llama(model) as llama:
        unsteered = llama.log_probabilities(IDS)
        assert largest(unsteered, transformers(found.model, found.profile, Steering(), IDS)) < EXACT[model_type]
        for steering, kinds in steerings(found):
            vector = tmp_path / "v.gguf" if "control-vector" in kinds else None
            lora = tmp_path / "l.gguf" if "lora" in kinds else None
            export(steering, found.profile, last, control_vector=vector, lora=lora)
            if vector:
                llama.control((vector, 1.0), first=1, last=1)
            llama.lora(lora)
            expected = transformers(found.model, found.profile, steering, IDS)
            assert largest(llama.log_probabilities(IDS), expected) < EXACT[model_type]
            assert largest(expected, unsteered) > 10 * EXACT[model_type]
            llama.control(first=1, last=1)
            llama.lora(None)
        assert torch.equal(llama.log_probabilities(IDS), unsteered)


def test_gains_before_a_norm(tmp_path: Path) -> None:
    """Gemma 2's, tied as all of them are."""
    found = planted("gemma2", tied=True)
    model = gguf_files.write(tmp_path / "model.gguf", found.model, pieces=True)
    found.model.save_pretrained(tmp_path / "model")
    mean = next(neuron.mean_activation for neuron in found.profile.steerable if neuron.index == 20)
    steering = Steering(scale={20: 4.0}, shift={20: -(1 - 4.0) * mean})
    export(steering, found.profile, read_last_layer(str(tmp_path / "model")), lora=tmp_path / "l.gguf")
    with Llama(model) as llama:
        unsteered = llama.log_probabilities(IDS)
        before = largest(unsteered, transformers(found.model, found.profile, Steering(), IDS))
        llama.lora(tmp_path / "l.gguf")
        expected = transformers(found.model, found.profile, steering, IDS)
        assert largest(llama.log_probabilities(IDS), expected) < 2 * before + 1e-4
        assert largest(expected, unsteered) > 10 * before


def test_a_control_vector_comes_after_a_norm(tmp_path: Path) -> None:
    """Gemma 2's on the MLP's output: what `after_norm` relies on."""
    found = planted("gemma2", tied=True)
    model = gguf_files.write(tmp_path / "model.gguf", found.model, pieces=True)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor("direction.1", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hook = locate(found.model).final_norm.register_forward_pre_hook(lambda module, args: (args[0] + direction, *args[1:]))
    with torch.no_grad():
        expected = found.model(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
    hook.remove()
    with Llama(model) as llama:
        unsteered = llama.log_probabilities(IDS)
        before = largest(unsteered, transformers(found.model, found.profile, Steering(), IDS))
        llama.control((tmp_path / "v.gguf", 1.0), first=1, last=1)
        assert largest(llama.log_probabilities(IDS), expected) < 2 * before + 1e-4
        assert largest(expected, unsteered) > 10 * before


class Demo:
    """The bundled model as a file of float32, its profile and its last layer."""

    def __init__(self, place: Path) -> None:
        self.model, self.tokenizer, self.profile = confsteer.demo.load()
        count = self.model.config.vocab_size
        words = {"tokens": [f"t{i}" for i in range(count)], "token_type": [1] * count}
        says = {f"tokenizer.ggml.{key}": value for key, value in words.items()}
        self.file = gguf_files.write(place / "demo.gguf", self.model, says=says)
        self.last: LastLayer = read_last_layer(str(DEMO))
        self.ids: list[int] = self.tokenizer("It was the best of times, it was the worst of times, it was the age")["input_ids"]

    def expected(self, steering: Steering) -> Tensor:
        return transformers(self.model, self.profile, steering, self.ids)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("demo"))


def test_the_bundled_model_at_several_scales(demo: Demo, tmp_path: Path) -> None:
    """A scale multiplies the push, as a shift of each neuron by that much of it does."""
    vector, steering = tmp_path / "v.gguf", Steering(entropy=0.6)
    export(steering, demo.profile, demo.last, control_vector=vector)
    bias = dict(zip((n.index for n in demo.profile.steerable), demo.profile.edit(steering).bias.tolist(), strict=True))
    with Llama(demo.file) as llama:
        unsteered = llama.log_probabilities(demo.ids)
        before = largest(unsteered, demo.expected(Steering()))
        for scale in (-0.5, 0.25, 1.0, 2.0):
            llama.control((vector, scale), first=3, last=3)
            pushed = demo.expected(Steering(shift={index: scale * push for index, push in bias.items()}))
            assert largest(llama.log_probabilities(demo.ids), pushed) < 2 * before < 2e-2 < largest(pushed, unsteered)
        # Two files add up.
        llama.control((vector, 0.75), (vector, -0.5), first=3, last=3)
        both = llama.log_probabilities(demo.ids)
        llama.control((vector, 0.25), first=3, last=3)
        assert largest(both, llama.log_probabilities(demo.ids)) < 1e-4


def test_no_layer_but_the_last_carries_it(demo: Demo, tmp_path: Path) -> None:
    vector = tmp_path / "v.gguf"
    export(Steering(entropy=0.6), demo.profile, demo.last, control_vector=vector)
    with Llama(demo.file) as llama:
        unsteered = llama.log_probabilities(demo.ids)
        llama.control((vector, 1.0), first=1, last=2)
        assert torch.equal(llama.log_probabilities(demo.ids), unsteered)
        llama.control((vector, 1.0), first=1, last=llama.n_layers)
        assert not torch.equal(llama.log_probabilities(demo.ids), unsteered)


@pytest.mark.real
@pytest.mark.parametrize(("name", "profile"), [("smollm2", "smollm2-135m-instruct"), ("gemma", "gemma-3-270m")])
def test_real_models_as_people_have_them(name: str, profile: str, tmp_path: Path) -> None:
    """Quantised weights, which llama.cpp multiplies by quantised activations: steering adds nothing to that difference."""
    file = FILE.with_name(json.loads((ROOT / "eval" / "real_models.json").read_text())[name]["file"])
    if not file.exists():
        pytest.skip(f"there is no {file}: python eval/fetch_model.py {name} fetches it")
    model, tokenizer = load_model(str(file), device="cpu")
    found, last = Profile.load(profile), read_last_layer(str(file))
    ids = prompt_ids("The capital of France is Paris, and the capital of Germany is Berlin, which has", tokenizer, chat=False)
    neuron = found.entropy_neurons[0]
    gain = Steering(scale={neuron.index: 3.0}, shift={neuron.index: 2.0 * neuron.mean_activation})
    vector, lora = tmp_path / "v.gguf", tmp_path / "l.gguf"
    with Llama(file) as llama:

        def divergence(expected: Tensor) -> float:
            given = llama.log_probabilities(ids)
            return float((expected.exp() * (expected - given)).sum(-1).mean())

        unsteered = transformers(model, found, Steering(), ids)
        before = divergence(unsteered)
        export(gain, found, last, lora=lora)
        llama.lora(lora)
        expected = transformers(model, found, gain, ids)
        assert divergence(expected) < 2 * before < divergence(unsteered)
        llama.lora(None)
        if last.anatomy.write_norm is None:
            dial = Steering(entropy=0.5 * found.reach("entropy")[1])
            export(dial, found, last, control_vector=vector)
            llama.control((vector, 1.0), first=last.anatomy.layer, last=last.anatomy.layer)
            assert divergence(transformers(model, found, dial, ids)) < 2 * before < divergence(unsteered)


SERVER = """
import json, sys, urllib.request
import xllamacpp
model, lora, *ids = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.port = model, 512, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 0.0)]
server = xllamacpp.Server(params)
ids = [int(i) for i in ids]
for scale in (0.0, 1.0, 0.5, 0.0):
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": 50, "temperature": 0, "lora": [{"id": 0, "scale": scale}]}
    request = urllib.request.Request(
        server.listening_address + "/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    (token,) = json.load(urllib.request.urlopen(request))["choices"][0]["logprobs"]["content"]
    print(json.dumps({one["id"]: one["logprob"] for one in token["top_logprobs"]}))
"""
"""llama-server in a process of its own: one adapter, another scale in each request."""


def test_a_request_to_llama_server_says_its_scale(demo: Demo, tmp_path: Path) -> None:
    neuron = demo.profile.entropy_neurons[0]
    steering = Steering(scale={neuron.index: 9.0}, shift={neuron.index: -(1 - 9.0) * neuron.mean_activation})
    export(steering, demo.profile, demo.last, lora=tmp_path / "l.gguf")
    half = Steering(scale={neuron.index: 5.0}, shift={neuron.index: -(1 - 5.0) * neuron.mean_activation})
    arguments = [sys.executable, "-c", SERVER, str(demo.file), str(tmp_path / "l.gguf"), *map(str, demo.ids)]
    environment: dict[str, Any] = {"PYTHONPATH": str(folder())}
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    for answer, asked in zip(answers, (Steering(), steering, half, Steering()), strict=True):
        expected = demo.expected(asked)[-1]
        # The server's cache is in float16.
        assert max(abs(float(expected[int(i)]) - value) for i, value in answer.items()) < 2e-2
    assert max(abs(answers[0][i] - answers[1].get(i, -99)) for i in list(answers[0])[:5]) > 0.1


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "starcoder2"])
def test_a_baked_file_needs_no_option(model_type: str, tmp_path: Path) -> None:
    found = planted(model_type)
    model = gguf_files.write(tmp_path / "model.gguf", found.model)
    last = read_last_layer(str(model))
    for i, (steering, _) in enumerate(steerings(found)):
        bake_file(steering, found.profile, last, tmp_path / f"{i}.gguf")
        with Llama(tmp_path / f"{i}.gguf") as llama:
            expected = transformers(found.model, found.profile, steering, IDS)
            assert largest(llama.log_probabilities(IDS), expected) < EXACT.get(model_type, 2e-2)


def test_llama_cpp_reads_a_bias_where_it_is_said_to_and_refuses_it_elsewhere(tmp_path: Path) -> None:
    """So no file with a constant that is left out is ever run."""
    for family in FAMILIES:
        tied = family.model_type.startswith("gemma")
        name = gguf_files.ARCHITECTURES.get(family.model_type, family.model_type)
        if name not in NORM_OFFSET:
            continue
        model = tiny_model(family.model_type, family.config | {"tie_word_embeddings": tied})
        path = gguf_files.write(tmp_path / "m.gguf", model, pieces=tied, more={"blk.1.ffn_down.bias": torch.ones(32)})
        if name in READ_A_BIAS:
            Llama(path).__exit__(None, None, None)
        else:
            with pytest.raises(RuntimeError, match="does not load"):
                Llama(path)
