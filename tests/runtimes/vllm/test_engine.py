"""Engines against transformers, log-probability by log-probability."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch
import vllm
from packaging.version import Version
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

import confsteer
from confsteer import ConfsteerError, Profile, ProfileMismatchError, UnsupportedModelError, UnsupportedServerError
from confsteer.model.loading import DEMO
from confsteer.runtimes.vllm.front.command import server_command
from confsteer.runtimes.vllm.out_of_reach import OLDEST_WITH_EXPERTS
from tests.mixtures import planted_experts
from tests.models import planted_model
from tests.planted import planted
from tests.runtimes.vllm import parity
from tests.runtimes.vllm.parity import V2, Ask, Subject

FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "smolvlm"]
"""The last is a model that sees, of those that vLLM has without torchvision."""

Make = Callable[[str], Subject]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A subject by its model type, or the bundled model; made once."""
    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = parity.bundled(folder) if name == "bundled" else parity.subject(name, folder)
        return made[name]

    return subject


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@pytest.mark.parametrize("model_type", FAMILIES)
def test_many_requests_with_mixed_steerings_are_those_of_transformers(model_type: str, make: Make) -> None:
    """More steerings than slots: 4 requests run at once, and a table of 4 rows is written over and over."""
    subject = make(model_type)
    asks = parity.mixed(subject, 36)
    # There is nothing to read images with; those who see get texts alone.
    options = {"limit_mm_per_prompt": {"image": 0}} if model_type == "smolvlm" else {}
    with parity.engine(subject, max_num_seqs=4, **options) as llm:
        assert type(worker_of(llm)).__name__ == "SteeringCPUWorker"
        assert worker_of(llm).use_v2_model_runner == V2
        assert len(parity.steerings(subject.profile)) > 4
        outputs = parity.ask_all(llm, asks, prompt_logprobs=2)
    parity.check(parity.compare(subject, asks, outputs), asks)


def preemptions(llm: Any) -> float:
    return next(float(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


EXPERTS = pytest.mark.skipif(Version(vllm.__version__) < Version(OLDEST_WITH_EXPERTS), reason="experts are out of reach there")
ONE_RUNNER = pytest.mark.skipif(V2, reason="the model is the same whichever runner it has")


@EXPERTS
@ONE_RUNNER
def test_neurons_of_routed_and_shared_experts(tmp_path: Path) -> None:
    """The shared expert of Qwen2-MoE has a gate.

    vLLM 0.32 packs experts for its CPU kernel when it starts, and not when their weights come again: the kernel's answers tell.
    """
    subject = parity.mixture("qwen2_moe", tmp_path / "subject")
    assert [neuron.key for neuron in subject.profile.steerable] == ["1.5", "shared.7", "2.3"]
    asks = parity.mixed(subject, 36)
    with parity.engine(subject, max_num_seqs=4) as llm:
        parity.check(parity.compare(subject, asks, parity.ask_all(llm, asks, prompt_logprobs=2)), asks)
        # Nothing has changed.
        assert llm.collective_rpc(lambda worker: 3) == [3]
        parity.check(parity.compare(subject, asks[3:9], parity.ask_all(llm, asks[3:9])), asks[3:9])
        with pytest.raises(ProfileMismatchError, match="nearly its own, but others"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(subject.model_folder)})
        with pytest.raises(VLLMValidationError, match="no longer steers"):
            parity.ask_all(llm, asks[3:9])


@ONE_RUNNER
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_null_direction_is_added_before_the_final_norm(model_type: str, tmp_path: Path) -> None:
    """Beside neurons, and behind a norm on the MLP's output."""
    subject = parity.with_direction(planted(model_type, wide=True, tied=model_type == "gemma2"), tmp_path)
    asks = parity.mixed(subject, 36)
    with parity.engine(subject, max_num_seqs=4) as llm:
        outputs = parity.ask_all(llm, asks, prompt_logprobs=2)
    parity.check(parity.compare(subject, asks, outputs), asks)


@ONE_RUNNER
def test_a_mixture_whose_experts_are_out_of_reach_has_its_null_direction(tmp_path: Path) -> None:
    """Expert parallel, here of one rank. What would turn a neuron is refused, and so are other weights."""
    found = planted_experts("mixtral", wide=True)
    without = parity.saved(found, tmp_path / "without")
    with pytest.raises(UnsupportedModelError, match=r"cannot be steered in vLLM, because .*confsteer calibrate MODEL --null-dir"):
        config(without.model_folder, without.profile_folder, enable_expert_parallel=True)
    subject = parity.with_direction(found, tmp_path / "with")
    asked = [None, {"entropy": 0.3}, "entropy=-0.05", {"entropy": 0.2, "positions": "generated"}]
    asks = [Ask(p, s) for p, s in zip(parity.prompts(4, vocabulary=96, longest=24, seed=0), asked, strict=True)]
    with parity.engine(subject, enable_expert_parallel=True) as llm:
        outputs = parity.ask_all(llm, asks, prompt_logprobs=2)
        with pytest.raises(VLLMValidationError, match="no token-frequency neurons"):
            parity.ask_all(llm, [Ask([1, 2, 3], "unigram=0.1")])
    parity.check(parity.compare(subject, asks, outputs), asks)
    with (
        pytest.raises(ProfileMismatchError, match="reads its null direction by"),
        parity.engine(subject, enable_expert_parallel=True, load_format="dummy"),
    ):
        pass


def test_the_bundled_model_under_pressure(make: Make) -> None:
    """Prefill in chunks of 16 tokens, too few blocks for all requests to stay, several completions each."""
    subject, completions = make("bundled"), 1 if V2 else 2
    asks = parity.mixed(subject, 24, tokens=40, longest=60)
    windows = parity.windows(subject, 6, tokens=24, longest=60)
    options = {"max_num_batched_tokens": 16, "block_size": 32, "num_gpu_blocks_override": 9, "disable_log_stats": False}
    with parity.engine(subject, max_model_len=128, **options) as llm:
        outputs = parity.ask_all(llm, asks, n=completions)
        preempted = [preemptions(llm)]
        outputs_of_windows = parity.ask_all(llm, windows, temperature=0.0)
        preempted.append(preemptions(llm))
    assert 0 < preempted[0] < preempted[1]
    parity.check(parity.compare(subject, asks, outputs), asks, completions)
    parity.check(parity.compare(subject, windows, outputs_of_windows), windows)


def test_a_prefix_cached_under_one_steering_serves_another(make: Make) -> None:
    subject = make("bundled")
    prompt = parity.prompts(1, vocabulary=4096, longest=2, seed=1)[0] * 30
    asks = [Ask(prompt, steering) for steering in parity.steerings(subject.profile)]
    with parity.engine(subject, max_model_len=128, block_size=32) as llm:
        first = parity.ask_all(llm, asks[:3])
        outputs = first + parity.ask_all(llm, asks[3:])
    assert all(output.num_cached_tokens >= 32 for output in outputs[3:])
    parity.check(parity.compare(subject, asks, outputs), asks)


@pytest.mark.processes
def test_drafts_are_verified_under_their_request_s_steering(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On repeated tokens the bundled model copies, so that n-gram drafts are accepted."""
    # After a proposer has been in this process, vLLM 0.32 cannot start another engine in it.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    subject = make("bundled")
    asked = parity.steerings(subject.profile)
    prompts = parity.prompts(12, vocabulary=4096, longest=40, seed=2)
    asks = [Ask((prompt * 4)[:60], steering, 20) for prompt, steering in zip(prompts, asked, strict=False)]
    asks += parity.windows(subject, 6, tokens=20, longest=60)
    options = {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2},
        "distributed_executor_backend": "mp",
        "disable_log_stats": False,
        "max_model_len": 128,
    }
    with parity.engine(subject, **options) as llm:
        outputs = parity.ask_all(llm, asks, temperature=0.0)
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
    parity.check(parity.compare(subject, asks, outputs), asks)


def test_requests_that_are_aborted_leave_the_others_right(make: Make) -> None:
    subject = make("gpt2")
    asks = parity.mixed(subject, 24, tokens=12)
    finished: dict[str, Any] = {}
    with parity.engine(subject) as llm:
        engine = llm.llm_engine
        for i, ask in enumerate(asks):
            engine.add_request(str(i), {"prompt_token_ids": ask.prompt}, parity.sampling(ask))
        for step in range(200):
            if step in (1, 3, 5):
                engine.abort_request([str(i) for i in range(step, len(asks), 6)])
            finished |= {output.request_id: output for output in engine.step() if output.finished}
            if not engine.has_unfinished_requests():
                break
    left = [i for i in range(len(asks)) if i % 6 not in (1, 3, 5)]
    assert sorted(map(int, finished)) == left
    asks = [asks[i] for i in left]
    parity.check(parity.compare(subject, asks, [finished[str(i)] for i in left]), asks)


@pytest.mark.skipif(V2, reason="Inductor looks for a Triton that compiles")
def test_compiled_and_again_from_the_cache(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second engine finds the compiled graph; a third, with fewer neurons, must not take it."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    subject = make("llama")
    fewer = subject.profile.model_copy(update={"frequency_neurons": (), "presets": {}})
    fewer = fewer.model_copy(update={"response": {"entropy": fewer.response["entropy"]}})
    other = subject._replace(profile=fewer, profile_folder=fewer.save(tmp_path / "fewer"))
    for steered in (subject, subject, other):
        asks = [ask for ask in parity.mixed(subject, 24) if steered is subject or "preset" not in str(ask.steering)]
        if steered is other:
            asks = [Ask(ask.prompt, {"entropy": 0.1 * i}) for i, ask in enumerate(asks[:8], start=1)]
        with parity.engine(steered, enforce_eager=False) as llm:
            outputs = parity.ask_all(llm, asks)
        parity.check(parity.compare(steered, asks, outputs), asks)


@pytest.mark.processes
@pytest.mark.parametrize("eager", [True, False])
def test_models_of_transformers_itself(eager: bool, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX has no model in vLLM, which runs transformers' then, and changes its class for the process: so not in this one."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    subject = make("gpt_neox")
    asks = parity.mixed(subject, 24)
    with parity.engine(subject, enforce_eager=eager, distributed_executor_backend="mp") as llm:
        outputs = parity.ask_all(llm, asks)
    parity.check(parity.compare(subject, asks, outputs), asks)


@pytest.mark.processes
def test_tensor_parallel_and_processes_of_their_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    subject = make("qwen3")
    asks = parity.mixed(subject, 24)
    with parity.engine(subject, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        outputs = parity.ask_all(llm, asks, prompt_logprobs=1)
    parity.check(parity.compare(subject, asks, outputs), asks)


def test_with_lora_adapters_on_the_projection_itself(make: Make, tmp_path: Path) -> None:
    """As in transformers: the adapter sees the steered activations. There is room for one, so the second unloads the first."""
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    subject = make("llama")
    adapted: dict[str, Any] = {}
    for name in ("first", "second"):
        base = planted_model("llama", torch.ones(96), wide=True)
        base.load_state_dict(subject.model.state_dict())
        torch.manual_seed(len(adapted))
        config = LoraConfig(r=8, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
        adapted[name] = get_peft_model(base, config).eval()
        adapted[name].save_pretrained(str(tmp_path / name))
    asks = parity.mixed(subject, 16)
    with parity.engine(subject, enable_lora=True, max_lora_rank=8, max_loras=1, max_cpu_loras=1) as llm:
        params = [parity.sampling(ask) for ask in asks]
        prompts = [{"prompt_token_ids": ask.prompt} for ask in asks]
        for name in ("first", "second", "first"):
            adapter = LoRARequest(name, 1 + list(adapted).index(name), str(tmp_path / name))
            outputs = llm.generate(prompts, params, lora_request=adapter, use_tqdm=False)
            parity.check(parity.compare(subject._replace(model=adapted[name]), asks, outputs), asks)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_baked_checkpoint_needs_no_confsteer(model_type: str, make: Make, tmp_path: Path) -> None:
    """GPT-2 has a bias where the constant part goes; the Llama is given one."""
    subject = make(model_type)
    asked = "preset=calm entropy=0.2"
    model = copy.deepcopy(subject.model)
    confsteer.bake(model, subject.profile, asked)
    folder = shutil.copytree(subject.model_folder, tmp_path / "baked")  # for its tokenizer
    model.save_pretrained(folder)
    asks = [Ask(prompt, None) for prompt in parity.prompts(8, vocabulary=96, longest=24, seed=0)]
    with parity.engine(subject._replace(model_folder=folder), additional_config={}) as llm:
        assert "Steering" not in type(worker_of(llm)).__name__
        outputs = parity.ask_all(llm, asks, prompt_logprobs=2)
    asks = [ask._replace(steering=asked) for ask in asks]
    parity.check(parity.compare(subject, asks, outputs), asks)


def test_the_default_is_for_requests_that_ask_for_nothing(make: Make) -> None:
    from vllm.sampling_params import BeamSearchParams

    from confsteer.runtimes.vllm.front.admission import admission_to

    subject = make("gpt2")
    default = {"entropy": 0.4}
    asked: list[Any] = [None, {}, "neutral", "entropy=-0.05"]
    done: list[Any] = [default, None, None, "entropy=-0.05"]
    prompts = parity.prompts(4, vocabulary=96, longest=9, seed=0)
    asks = [Ask(prompt, wanted) for prompt, wanted in zip(prompts, asked, strict=True)]
    with parity.engine(subject, default=default) as llm:
        outputs = parity.ask_all(llm, asks)
        admission = admission_to(llm.llm_engine)
        assert admission is not None
        admission.default = admission.canonical("entropy=0.4 positions=first:2")
        with pytest.raises(VLLMValidationError, match="positions=first:2 does not go together with beam search in vLLM"):
            llm.beam_search([{"prompt_token_ids": prompts[0]}], BeamSearchParams(beam_width=2, max_tokens=2))
    asks = [ask._replace(steering=steering) for ask, steering in zip(asks, done, strict=True)]
    parity.check(parity.compare(subject, asks, outputs), asks)


def test_what_is_asked_wrongly_is_refused_with_the_sentence_and_counted(make: Make) -> None:
    subject = make("gpt2")
    wrong = [({"entropy": 9}, "out of reach"), ("entropie=1", "unknown key"), ([1], "not list"), ({"preset": "x"}, "has calm")]
    wrong += [("", "asks for nothing")]
    misplaced = {"vllm_xargs": {"confsteer": "entropy=0.1"}}

    def counted(name: str) -> float:
        return prometheus_client.REGISTRY.get_sample_value(f"confsteer:{name}_total") or 0.0

    with parity.engine(subject) as llm:
        before = {name: counted(name) for name in ("steered_requests", "refused_requests", "steered_tokens")}
        for steering, sentence in wrong:
            with pytest.raises(VLLMValidationError, match=sentence):
                parity.ask_all(llm, [Ask([1, 2, 3], steering)])
        with pytest.raises(VLLMValidationError, match=r"nothing reads a steering in .*vllm_xargs\.confsteer"):
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], vllm.SamplingParams(extra_args=misplaced), use_tqdm=False)
        asks = [Ask([1, 2, 3], steering, tokens=5) for steering in (None, "entropy=0.1", {"scale": {5: 1.0}})]
        params = [parity.sampling(ask) for ask in asks]
        asked = [dict(p.extra_args) if p.extra_args else None for p in params]
        outputs = llm.generate([{"prompt_token_ids": ask.prompt} for ask in asks], params, use_tqdm=False)
        assert [p.extra_args for p in params] == asked, "the caller's parameters are the caller's"
    parity.compare(subject, asks, outputs)
    after = {name: counted(name) for name in before}
    # A scale of one changes nothing, and does not count.
    assert {name: after[name] - before[name] for name in before} == {
        "steered_requests": 1,
        "refused_requests": len(wrong) + 1,
        "steered_tokens": 5,
    }


def config(folder: Path | str, profile: Any, **options: Any) -> Any:
    settings = profile if isinstance(profile, dict) else {"profile": str(profile)}
    args = EngineArgs(model=str(folder), additional_config={"confsteer": settings}, max_model_len=64, **options)
    return args.create_engine_config()


def test_what_cannot_work_is_refused_before_weights_are_loaded(make: Make, tmp_path: Path) -> None:
    subject, other = make("gpt2"), make("llama")
    with pytest.raises(ProfileMismatchError, match=r"num_hidden_layers 4; .* has 2"):
        config(subject.model_folder, "confsteer-demo")
    changed = planted_model("gpt2", torch.ones(96), wide=True)
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(ProfileMismatchError, match="the same shape but other weights"):
        config(tmp_path / "changed", subject.profile_folder)
    with pytest.raises(ProfileMismatchError, match="n_neurons 128; this model has n_neurons 256"):
        config(subject.model_folder, other.profile_folder)
    with pytest.raises(ConfsteerError, match="out of reach"):
        config(subject.model_folder, {"profile": str(subject.profile_folder), "default": "entropy=9"})
    with pytest.raises(ConfsteerError, match=r"additional_config: confsteer\.profile: Field required\. It should be"):
        config(subject.model_folder, {"profil": "x"})
    with pytest.raises(ConfsteerError, match=r"additional_config: confsteer\.profile: Input should be a valid string"):
        config(subject.model_folder, {"profile": 3})
    args = EngineArgs(model=str(subject.model_folder), additional_config={"confster": {"profile": "x"}}, max_model_len=64)
    with pytest.raises(ConfsteerError, match=r"nothing reads 'confster': write 'confsteer'"):
        args.create_engine_config()
    with pytest.raises(UnsupportedServerError, match="worker class"):
        config(subject.model_folder, subject.profile_folder, worker_cls="mine.Worker")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ([], None),
        (["--additional-config.note", "hello", "--seed", "1"], "hello"),
        (["--additional-config", '{"note": {"a": [1]}}'], {"a": [1]}),
        (['--additional_config={"note": 1}', "--additional-config.note", "2"], 2),
        (["--config", "FILE"], "file"),
        (["--config", "FILE", "--additional-config.note", "hello"], "hello"),
    ],
)
def test_what_vllm_reads_has_the_profile_whatever_else_is_given(options: list[str], note: Any, tmp_path: Path) -> None:
    """By vLLM's own parser, which lets the last ``--additional-config`` win and puts dotted ones last."""
    file = tmp_path / "options.yaml"
    file.write_text("additional-config:\n  note: file\n  other: 1\n")
    options = [str(file) if option == "FILE" else option for option in options]
    arguments = server_command(str(DEMO), "confsteer-demo", "entropy=0.2", options, {}).arguments[2:]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--host")
    found = parser.parse_args(arguments)
    assert found.additional_config.pop("confsteer") == {"profile": "confsteer-demo", "default": "entropy=0.2"}
    assert found.additional_config == ({"other": 1} if str(file) in options else {}) | ({} if note is None else {"note": note})
    assert found.host == "127.0.0.1"


def test_a_profile_that_was_asked_for_and_is_not_there_is_a_refusal_to_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["vllm", "--additional-config", json.dumps({"confsteer": {"profile": "confsteer-demo"}})]
    monkeypatch.setattr(sys, "argv", [*asked, "--additional-config.note", "hello"])
    args = EngineArgs(model=str(make("gpt2").model_folder), additional_config={"note": "hello"}, max_model_len=64)
    with pytest.raises(ConfsteerError, match=r"has come out without it: \{'note': 'hello'\}"):
        args.create_engine_config()


def test_an_unknown_release_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(UnsupportedServerError, match=r"this is vLLM 0\.99\.0"):
        config(make("gpt2").model_folder, make("gpt2").profile_folder)


def test_without_the_configuration_nothing_happens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an unknown release or a steering in a request is looked at."""
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    args = EngineArgs(model=str(make("gpt2").model_folder), max_model_len=64)
    made = args.create_engine_config()
    assert made.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert made.additional_config == {}


def test_loaded_weights_that_are_not_the_profile_s_are_refused(make: Make) -> None:
    """What is on disk fits, what is loaded does not."""
    with (
        pytest.raises(ProfileMismatchError, match="the model that vLLM loaded has other weights"),
        parity.engine(make("gpt2"), load_format="dummy"),
    ):
        pass


def test_an_engine_that_would_not_steer_does_not_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a compiled graph without the edit had been taken from a cache."""
    from confsteer.runtimes.vllm.worker import projection

    monkeypatch.setattr(projection, "_steer", lambda module, args: None)
    with pytest.raises(confsteer.UnsupportedModelError, match="pushing the neurons changes nothing"), parity.engine(make("gpt2")):
        pass


def test_weights_that_come_later_steer_only_if_they_are_the_profile_s(make: Make, tmp_path: Path) -> None:
    """The same ones do; others are refused with the sentence, and answered with only where nothing is to be steered."""
    subject = make("gpt2")
    others = {"strangers": planted_model("gpt2", torch.ones(96), wide=True), "relatives": copy.deepcopy(subject.model)}
    with torch.no_grad():
        others["relatives"].transformer.h[-1].mlp.c_proj.weight[:, 3] *= 1.0001  # too little for the norms to tell
    asks = parity.mixed(subject, 12)[1::3]
    plain = [Ask(ask.prompt, None) for ask in asks]
    with parity.engine(subject) as llm:

        def reload(path: Path) -> None:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            llm.reset_prefix_cache()

        before = worker_of(llm)._projection.table
        for name, model in others.items():
            model.save_pretrained(tmp_path / name)
            with pytest.raises(ProfileMismatchError, match="other weights"):
                reload(tmp_path / name)
            llm.reset_prefix_cache()
            with pytest.raises(VLLMValidationError, match="no longer steers"):
                parity.ask_all(llm, asks)
            outputs = parity.ask_all(llm, plain)
            parity.check(parity.compare(subject._replace(model=model), plain, outputs), plain)
        # Weights need not come from the disk.
        for model, fits in ((others["relatives"], False), (subject.model, True)):
            weights = [(name.removeprefix("transformer."), value) for name, value in model.state_dict().items()]
            with contextlib.nullcontext() if fits else pytest.raises(ProfileMismatchError, match="nearly its own"):
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        reload(subject.model_folder)
        parity.check(parity.compare(subject, asks, parity.ask_all(llm, asks)), asks)
        assert worker_of(llm)._projection.table is before
        _change_weights_from_within(llm, subject, asks, plain)
        # Nobody has told the front process.
        worker_of(llm).model_runner.get_model().load_weights([("transformer.ln_f.weight", torch.full((64,), 2.0))])
        with pytest.raises(ProfileMismatchError, match="no longer steers"):
            parity.ask_all(llm, asks)


def _change_weights_from_within(llm: Any, subject: Subject, asks: list[Ask], plain: list[Ask]) -> None:
    """By a method of an extension of the worker, by whatever name, awake and asleep; and by what nobody is told of."""
    engine, name = llm.llm_engine, "transformer.ln_f.weight"
    weights = subject.model.state_dict()[name]

    def halve(worker: Any) -> None:
        worker.model_runner.get_model().load_weights([(name, weights * 0.5)])

    def reload() -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(subject.model_folder)})
        llm.reset_prefix_cache()

    assert llm.collective_rpc(lambda worker: 3) == [3]
    parity.check(parity.compare(subject, asks, parity.ask_all(llm, asks)), asks)
    for asleep in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine), "is_sleeping", lambda self: asleep)  # noqa: B023
            llm.collective_rpc(halve)
        engine.wake_up()
        with pytest.raises(VLLMValidationError, match="no longer steers"):
            parity.ask_all(llm, asks)
        assert len(parity.ask_all(llm, plain)) == len(plain)
        # What has been found to be another's is not taken for the profile's because its last layer is back.
        llm.collective_rpc(lambda worker: worker.model_runner.get_model().load_weights([(name, weights)]))
        with pytest.raises(VLLMValidationError, match="no longer steers"):
            parity.ask_all(llm, asks)
        reload()
        parity.check(parity.compare(subject, asks, parity.ask_all(llm, asks)), asks)


def test_sleep_leaves_steering_as_it_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's workers do not sleep on a CPU: here its GPU worker's code runs, and memory that is lost is memory that is zeroed."""
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
    from vllm.v1.worker.gpu_worker import Worker

    subject = make("gpt2")
    asks = parity.mixed(subject, 12)[1::3]
    with parity.engine(subject) as llm:
        worker = worker_of(llm)
        model = worker.model_runner.get_model()

        class Pool:
            """Level 1 keeps what it frees, level 2 does not."""

            def suspend(self, level: int) -> None:
                tensors = [*model.parameters(), *model.buffers()]
                self.kept = [(tensor, tensor.detach().clone()) for tensor in tensors] if level == 1 else []
                for tensor in tensors:
                    tensor.data.zero_()

            def resume(self, tags: Any) -> None:
                for tensor, value in self.kept:
                    tensor.data.copy_(value)

        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0), raising=False)
        monkeypatch.setattr(SleepModeBackendFactory, "create_backend", lambda *_: Pool())
        for level in (1, 2):
            outputs = parity.ask_all(llm, asks)
            parity.check(parity.compare(subject, asks, outputs), asks)
            Worker.sleep(worker, level)
            assert not any(tensor.any() for tensor in model.parameters())
            Worker.wake_up(worker)
            if level == 2:
                llm.collective_rpc("reload_weights")
            llm.reset_prefix_cache()
        outputs = parity.ask_all(llm, asks)
    parity.check(parity.compare(subject, asks, outputs), asks)


@pytest.mark.processes
def test_a_server_s_engine_keeps_nothing_of_what_has_ended_and_refuses_other_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to look into the worker
    planted_model("gpt2", torch.ones(96), wide=True).save_pretrained(tmp_path)
    asyncio.run(_end_in_all_ways(make("gpt2"), others=tmp_path))


async def _end_in_all_ways(subject: Subject, others: Path) -> None:
    """Requests are read to the end, left, cancelled, or fed piece by piece by a client that ends, fails or never comes.

    Then the weights in `others` are loaded, and the former ones again.
    """
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=str(subject.model_folder),
        additional_config={"confsteer": {"profile": str(subject.profile_folder)}},
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
    )
    engine = AsyncLLM.from_engine_args(args)

    def sampling(steering: Any, tokens: int) -> Any:
        extra = {"confsteer": steering}
        kind = RequestOutputKind.DELTA
        return SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=5, extra_args=extra, output_kind=kind)

    async def pieces(end: str) -> AsyncIterator[Any]:
        if end == "nothing":
            return
        for _ in range(3):
            yield StreamingInput(prompt={"prompt_token_ids": [1, 2, 3]})
            await asyncio.sleep(0.02)
        if end == "late":
            await asyncio.sleep(1)
        elif end == "failure":
            raise RuntimeError("the client is broken")
        elif end == "never":
            await asyncio.sleep(60)

    async def ask(number: int, steering: Any) -> None:
        way = ["read", "left", "cancelled", "ends", "late", "nothing", "failure", "never"][number % 8]
        prompt: Any = pieces(way) if number % 8 > 2 else {"prompt_token_ids": [5, 6, 7]}
        stream = engine.generate(prompt, sampling(steering, 4 if number % 8 > 2 else 40), request_id=str(number))

        async def read() -> None:
            seen = 0
            async for output in stream:
                seen += len(output.outputs[0].token_ids)
                if way == "left" and seen >= 3:
                    break

        limit = {"cancelled": 0.1, "never": 0.5}.get(way)
        with (
            contextlib.suppress(asyncio.TimeoutError),
            pytest.raises(RuntimeError, match="the client is broken") if way == "failure" else contextlib.nullcontext(),
        ):
            await asyncio.wait_for(read(), limit)
        await stream.aclose()

    try:
        asked = [steering for steering in parity.steerings(subject.profile) if steering is not None]
        await asyncio.gather(*(ask(number, asked[number % len(asked)]) for number in range(24)))
        deadline = time.monotonic() + 30
        while engine.output_processor.request_states and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert not engine.output_processor.request_states
        # What has ended is made known to the workers with the next step.
        await ask(0, "{}")
        assert await engine.collective_rpc(_steered_requests) == [[]]

        with pytest.raises(Exception, match="other weights"):
            await engine.collective_rpc("reload_weights", kwargs={"weights_path": str(others)})
        with pytest.raises(VLLMValidationError, match="no longer steers"):
            await ask(0, "entropy=0.1")
        await ask(0, "{}")
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": str(subject.model_folder)})
        await ask(0, "entropy=0.1")
    finally:
        engine.shutdown()


def _steered_requests(worker: Any) -> list[str]:
    return list(worker._steered_requests._requests)


def test_the_start_up_line_says_what_can_be_steered() -> None:
    from confsteer.runtimes.vllm.worker.steering_worker import start_up_line

    profile = Profile.load("confsteer-demo")
    low, high = profile.reach("entropy")
    line = start_up_line(profile)
    assert line.startswith(f"steering confsteer-demo, layer 3: entropy {low:+.2f} to {high:+.2f} nats (767, ")
