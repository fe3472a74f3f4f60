from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TextIteratorStreamer, pipeline

import confsteer
from confsteer import NoNeuronsError, ProfileMismatchError, Steering, SteeringError
from confsteer.model.anatomy import LastLayerStates
from confsteer.model.dissect import dissect
from tests.models import FAMILIES, TinyFamily, planted_model, tiny_model
from tests.planted import Planted, planted

IDS = torch.randint(1, 96, (4, 10), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["gpt2", "llama"])
def found(request: pytest.FixtureRequest) -> Iterator[Planted]:
    yield planted(request.param)
    assert hooks(planted(request.param).model) == 0


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **kwargs).logits
    return result


def by_the_rule(found: Planted, steering: Steering, ids: Tensor = IDS) -> Tensor:
    """Log-probabilities by the closed form: ``residual + Σ (clip(gain a + bias, low, high) − a) w``."""
    anatomy = dissect(found.model)
    states: list[LastLayerStates] = []
    with anatomy.recording(states.append):
        logits(found.model, ids, use_cache=False)
    edit = found.profile.edit(steering)
    index = [neuron.index for neuron in found.profile.steerable]
    a = states[0].activations[:, index]
    gain, bias, low, high = map(torch.from_numpy, edit)
    change = (gain * a + bias).clamp(low, high) - a
    readout = anatomy.readout()
    steered = readout.centre(states[0].residual) + change @ readout.w_out[index]
    return readout.logits(steered).log_softmax(-1).view(*ids.shape, -1)


STEERINGS = [
    Steering(entropy=0.2),
    Steering(entropy=-0.1, unigram=0.05),
    Steering(scale={"entropy": 0.0}),
    Steering(scale={5: 3.0, 20: -2.0}),
    Steering(clamp={5: 1.5}),
    Steering(clamp={5: (0.1, None), 11: (None, 0.2), "frequency": (-0.1, 0.1)}),
]


@pytest.mark.parametrize("steering", STEERINGS, ids=str)
def test_steered_logits_follow_the_rule(found: Planted, steering: Steering) -> None:
    with confsteer.steer(found.model, found.profile, steering):
        steered = logits(found.model).log_softmax(-1)
    torch.testing.assert_close(steered, by_the_rule(found, steering), atol=1e-4, rtol=0)
    assert not torch.allclose(steered, logits(found.model).log_softmax(-1), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_type in ("gpt2", "llama", "opt")])
def test_neutral_steering_is_bit_identical(dtype: torch.dtype, family: TinyFamily) -> None:
    model = tiny_model(*family).to(dtype)
    profile = profile_for(model)
    unsteered = logits(model)
    for neutral in (Steering(), Steering(entropy=0.0, unigram=0.0), Steering(scale={"entropy": 1.0})):
        with confsteer.steer(model, profile, neutral):
            assert torch.equal(logits(model), unsteered)
    with confsteer.steer(model, profile, [Steering()] * 4):
        assert torch.equal(logits(model), unsteered)


def profile_for(model: PreTrainedModel) -> confsteer.Profile:
    """The planted model's profile, made to fit another model: its neurons are then just three neurons."""
    profile = planted("gpt2").profile
    anatomy = dissect(model)
    identity = profile.model.model_copy(update={"n_neurons": anatomy.n_neurons, "fingerprints": anatomy.fingerprints()})
    return profile.model_copy(update={"model": identity})


def test_each_row_follows_its_own_steering(found: Planted) -> None:
    steerings = [Steering(), Steering(entropy=0.2), Steering(clamp={5: 1.0}), Steering(unigram=-0.05)]
    with confsteer.steer(found.model, found.profile, steerings):
        together = logits(found.model)
    for row, steering in enumerate(steerings):
        with confsteer.steer(found.model, found.profile, steering):
            torch.testing.assert_close(together[row], logits(found.model)[row], atol=1e-5, rtol=1e-5)


def test_rows_are_told_apart_where_the_model_flattens_them() -> None:
    """OPT hands ``[batch · positions, n]`` to its last projection."""
    model = tiny_model(*next(f for f in FAMILIES if f.model_type == "opt"))
    profile = profile_for(model)
    with confsteer.steer(model, profile, [Steering(), Steering(clamp={5: 3.0})]):
        together = logits(model)
    assert torch.equal(together[:2], logits(model)[:2])
    with confsteer.steer(model, profile, clamp={5: 3.0}):
        torch.testing.assert_close(together[2:], logits(model)[2:], atol=1e-5, rtol=1e-5)


def test_beams_and_returned_sequences_follow_their_row(found: Planted) -> None:
    steerings = [Steering(entropy=0.3), Steering(entropy=-0.2)]
    arguments = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    with confsteer.steer(found.model, found.profile, steerings):
        together = found.model.generate(IDS[:2], **arguments)
    for row, steering in enumerate(steerings):
        with confsteer.steer(found.model, found.profile, steering):
            alone = found.model.generate(IDS[row : row + 1], **arguments)
        for one, other in zip(together[2 * row : 2 * row + 2].tolist(), alone.tolist(), strict=True):
            assert one[: len(other)] == other


@pytest.mark.parametrize("rows", [3, 1])
def test_a_batch_that_does_not_fit_the_steerings_is_refused(found: Planted, rows: int) -> None:
    with (
        confsteer.steer(found.model, found.profile, [Steering(), Steering(entropy=0.1)]),
        pytest.raises(SteeringError, match=f"2 steerings for a batch of {rows}"),
    ):
        logits(found.model, IDS[:rows])


def test_update_changes_the_steering_without_touching_hooks(found: Planted) -> None:
    with confsteer.steer(found.model, found.profile) as steerer:
        installed = [list(module._forward_pre_hooks.items()) for module in found.model.modules()]
        for steering in STEERINGS:
            steerer.update(steering)
            torch.testing.assert_close(
                logits(found.model).log_softmax(-1), by_the_rule_outside(found, steering), atol=1e-4, rtol=0
            )
        steerer.update()
        assert torch.equal(logits(found.model), neutral(found))
        assert [list(module._forward_pre_hooks.items()) for module in found.model.modules()] == installed


def by_the_rule_outside(found: Planted, steering: Steering) -> Tensor:
    return RULES[found.model.config.model_type][str(steering)]


def neutral(found: Planted) -> Tensor:
    return UNSTEERED[found.model.config.model_type]


RULES: dict[str, dict[str, Tensor]] = {}
UNSTEERED: dict[str, Tensor] = {}


@pytest.fixture(autouse=True, scope="module")
def _expected() -> None:
    """What is expected inside a context has to be computed outside of it."""
    for model_type in ("gpt2", "llama"):
        RULES[model_type] = {str(s): by_the_rule(planted(model_type), s) for s in STEERINGS}
        UNSTEERED[model_type] = logits(planted(model_type).model)


def test_a_request_may_come_as_text_json_or_keywords(found: Planted) -> None:
    outputs = []
    requests: list[Any] = ["entropy=0.2", '{"entropy": 0.2}', {"entropy": 0.2}, Steering(entropy=0.2), ["entropy=0.2"]]
    for request in requests:
        with confsteer.steer(found.model, found.profile, request):
            outputs.append(logits(found.model))
    assert all(torch.equal(outputs[0], output) for output in outputs)
    with pytest.raises(SteeringError, match="not both"), confsteer.steer(found.model, found.profile, Steering(), entropy=0.1):
        pass
    with pytest.raises(SteeringError, match="not float"), confsteer.steer(found.model, found.profile, 0.3):  # type: ignore[arg-type]
        pass
    with pytest.raises(SteeringError, match="empty list"), confsteer.steer(found.model, found.profile, []):
        pass
    mixed = [Steering(), Steering(positions="generated")]
    with pytest.raises(SteeringError, match="same positions"), confsteer.steer(found.model, found.profile, mixed):
        pass


def test_update_cannot_change_the_shape_of_a_request(found: Planted) -> None:
    with confsteer.steer(found.model, found.profile) as steerer:
        with pytest.raises(SteeringError, match="keeps the number"):
            steerer.update([Steering(), Steering()])
        with pytest.raises(SteeringError, match="positions"):
            steerer.update(positions="generated")


def test_generated_positions_leave_the_prompt_alone(found: Planted) -> None:
    unsteered = logits(found.model)
    with confsteer.steer(found.model, found.profile, clamp={5: 2.0}):
        everywhere = logits(found.model)
    with confsteer.steer(found.model, found.profile, clamp={5: 2.0}, positions="generated"):
        prompt = found.model(input_ids=IDS, use_cache=True)
        assert torch.equal(prompt.logits[:, :-1], unsteered[:, :-1])
        torch.testing.assert_close(prompt.logits[:, -1], everywhere[:, -1])
        # A pass that continues a cached text is steered everywhere, as verifying drafted tokens needs.
        with torch.no_grad():
            continued = found.model(input_ids=IDS[:, :3], past_key_values=prompt.past_key_values).logits
    with confsteer.steer(found.model, found.profile, clamp={5: 2.0}):
        expected = logits(found.model, torch.cat([IDS, IDS[:, :3]], dim=1))[:, -3:]
    torch.testing.assert_close(continued.detach(), expected, atol=1e-4, rtol=1e-4)


def test_generation_is_the_same_for_both_positions(found: Planted) -> None:
    """Only the last position of a prompt generates, and a key-value cache is not touched by steering."""
    outputs = []
    for request in ({"positions": "all"}, {"positions": "generated"}):
        with confsteer.steer(found.model, found.profile, {"entropy": 0.3, **request}):
            outputs.append(found.model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*outputs)


def test_a_cache_made_without_steering_serves_a_steered_request(found: Planted) -> None:
    with torch.no_grad():
        cache = found.model(input_ids=IDS[:, :6], use_cache=True).past_key_values
    with confsteer.steer(found.model, found.profile, entropy=0.3):
        continued = logits(found.model, IDS[:, 6:], past_key_values=cache)
        whole = logits(found.model)[:, 6:]
    torch.testing.assert_close(continued, whole, atol=1e-4, rtol=1e-4)


def test_sampling_streaming_and_pipelines_are_steered(found: Planted) -> None:
    with confsteer.steer(found.model, found.profile, entropy=0.3):
        torch.manual_seed(0)
        sampled = found.model.generate(IDS[:1], max_new_tokens=8, do_sample=True, pad_token_id=0, min_new_tokens=8)
        streamer = TextIteratorStreamer(found.tokenizer, skip_prompt=True)
        torch.manual_seed(0)
        thread = threading.Thread(
            target=found.model.generate,
            args=(IDS[:1],),
            kwargs={"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "streamer": streamer},
        )
        thread.start()
        streamed = "".join(streamer).split()
        thread.join()
        generator = pipeline("text-generation", model=found.model, tokenizer=found.tokenizer)
        text = generator("t3 t7 t11", max_new_tokens=5, do_sample=False, pad_token_id=0)[0]["generated_text"]
        greedy = found.model.generate(torch.tensor([[3, 7, 11]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    decode = found.tokenizer.decode
    assert streamed == str(decode(sampled[0, 10:])).split()
    assert re.findall(r"t\d+", text) == re.findall(r"t\d+", str(decode(greedy[0])))


def test_assisted_decoding_gives_the_same_tokens(found: Planted) -> None:
    draft = planted_model(found.model.config.model_type, torch.ones(96))
    for positions in ("all", "generated"):
        with confsteer.steer(found.model, found.profile, entropy=-0.2, positions=positions):
            alone = found.model.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
            assisted = found.model.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_model=draft)
        assert torch.equal(alone, assisted)


class Interruption(BaseException):
    pass


def test_the_model_is_restored_however_the_context_is_left(found: Planted) -> None:
    state = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    attributes = {id(m): set(vars(m)) for m in found.model.modules()}
    unsteered = logits(found.model)

    def check() -> None:
        assert hooks(found.model) == 0
        assert torch.equal(logits(found.model), unsteered)
        assert all(torch.equal(state[name], tensor) for name, tensor in found.model.state_dict().items())
        assert {id(m): set(vars(m)) for m in found.model.modules()} == attributes

    for exception in (RuntimeError, KeyboardInterrupt, Interruption, GeneratorExit):
        with pytest.raises(exception), confsteer.steer(found.model, found.profile, entropy=0.2):
            raise exception
        check()

    def abandoned() -> Iterator[int]:
        with confsteer.steer(found.model, found.profile, entropy=0.2):
            yield 1

    generator = abandoned()
    next(generator)
    assert hooks(found.model) > 0
    del generator
    gc.collect()
    check()
    for wrong in ({"entropy": 99.0}, {"scale": {4: 0.0}}, {"entropie": 0.1}):
        with pytest.raises(SteeringError), confsteer.steer(found.model, found.profile, **wrong):
            pass
        check()


def test_nested_contexts_on_one_model_are_refused(found: Planted) -> None:
    with confsteer.steer(found.model, found.profile, entropy=0.1):
        with (
            pytest.raises(SteeringError, match="being steered already"),
            confsteer.steer(found.model, found.profile, entropy=0.2),
        ):
            pass
        assert hooks(found.model) == 1, "the outer context goes on"
    with confsteer.steer(found.model, found.profile):
        pass


def test_two_models_at_once() -> None:
    one, other = planted("gpt2"), planted("llama")
    with confsteer.steer(one.model, one.profile, STEERINGS[0]), confsteer.steer(other.model, other.profile, STEERINGS[4]):
        a, b = logits(one.model).log_softmax(-1), logits(other.model).log_softmax(-1)
    torch.testing.assert_close(a, RULES["gpt2"][str(STEERINGS[0])], atol=1e-4, rtol=0)
    torch.testing.assert_close(b, RULES["llama"][str(STEERINGS[4])], atol=1e-4, rtol=0)


def test_another_models_profile_is_refused() -> None:
    with (
        pytest.raises(ProfileMismatchError, match="n_neurons"),
        confsteer.steer(planted("llama").model, planted("gpt2").profile, entropy=0.1),
    ):
        pass
    found = planted("gpt2")
    finetuned = planted_model("gpt2", torch.ones(96))
    with (
        pytest.raises(ProfileMismatchError, match="same shape but other weights"),
        confsteer.steer(finetuned, found.profile, entropy=0.1),
    ):
        pass


def test_an_empty_profile_is_refused() -> None:
    found = planted("gpt2")
    empty = found.profile.model_copy(update={"entropy_neurons": (), "frequency_neurons": (), "response": {}})
    with pytest.raises(NoNeuronsError, match="nothing to steer"), confsteer.steer(found.model, empty):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_edit_once(dtype: torch.dtype) -> None:
    """The edited activation is the float32 rule on the model's own activation, rounded to the model's precision."""
    found = planted("llama")
    model = planted_model("llama", torch.ones(96))
    model.load_state_dict(found.model.state_dict())
    model.to(dtype)
    anatomy = dissect(model)
    seen: list[Tensor] = []
    steering = Steering(scale={5: 0.3}, entropy=0.1)
    anatomy.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with confsteer.steer(model, found.profile, steering):
        anatomy.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        logits(model)
    index = [neuron.index for neuron in found.profile.steerable]
    gain, bias, low, high = map(torch.from_numpy, found.profile.edit(steering))
    expected = (seen[0][..., index].float() * gain + bias).clamp(low, high).to(dtype)
    assert torch.equal(seen[1][..., index], expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_code_follows_update(backend: str) -> None:
    found = planted("gpt2")
    torch._dynamo.reset()
    with confsteer.steer(found.model, found.profile) as steerer:
        compiled: Any = torch.compile(found.model, backend=backend)
        torch.testing.assert_close(logits(compiled), UNSTEERED["gpt2"], atol=1e-4, rtol=1e-4)
        recompiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for steering in STEERINGS[:3]:
            steerer.update(steering)
            torch.testing.assert_close(logits(compiled).log_softmax(-1), RULES["gpt2"][str(steering)], atol=1e-4, rtol=0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == recompiles
    torch._dynamo.reset()


def test_compiled_code_with_graph_breaks_is_steered_within_the_context_and_not_after() -> None:
    """Each part of the model is then compiled by itself, and those with hooks must not be taken for those without."""
    found = planted("gpt2")
    torch._dynamo.reset()
    handle = found.model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
    with confsteer.steer(found.model, found.profile, STEERINGS[0]):
        compiled: Any = torch.compile(found.model, backend="eager")
        torch.testing.assert_close(logits(compiled).log_softmax(-1), RULES["gpt2"][str(STEERINGS[0])], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(compiled), UNSTEERED["gpt2"], atol=1e-4, rtol=1e-4)
    handle.remove()
    torch._dynamo.reset()


def test_a_peft_model_is_steered_with_its_adapter() -> None:
    """The edit is on the activation, so an adapter on the projection sees it too; the profile is the base model's."""
    from peft import LoraConfig, get_peft_model

    found = planted("llama")
    base = planted_model("llama", torch.ones(96))
    base.load_state_dict(found.model.state_dict())
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)).eval()
    adapted = logits(model)
    with confsteer.steer(model, found.profile, clamp={5: 2.0}):
        steered = logits(model)
    merged: Any = model.merge_and_unload()
    projection = merged.model.layers[-1].mlp.down_proj

    def clamp(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        clamped = args[0].clone()
        clamped[..., 5] = 2.0
        return (clamped,)

    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    handle = projection.register_forward_pre_hook(clamp)
    torch.testing.assert_close(logits(merged), steered, atol=1e-4, rtol=1e-4)
    handle.remove()
    assert not torch.allclose(steered, adapted, atol=1e-2)


def test_offloaded_weights_are_read_and_steered() -> None:
    from accelerate import cpu_offload

    found = planted("llama")
    model = planted_model("llama", torch.ones(96))
    model.load_state_dict(found.model.state_dict())
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    with confsteer.steer(model, found.profile, STEERINGS[1]):
        steered = logits(model)
    torch.testing.assert_close(steered.log_softmax(-1), RULES["llama"][str(STEERINGS[1])], atol=1e-4, rtol=0)


def test_gradients_flow_through_a_steered_model(found: Planted) -> None:
    embedding = found.model.get_input_embeddings()
    with confsteer.steer(found.model, found.profile, scale={"entropy": 0.5}):
        found.model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.abs().sum() > 0
    found.model.zero_grad()


def restored(found: Planted) -> bool:
    return hooks(found.model) == 0 and torch.equal(logits(found.model), neutral(found))


def test_a_steered_model_is_not_copied_but_its_weights_are_saved(found: Planted, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    with confsteer.steer(found.model, found.profile, entropy=0.2):
        for copying in (
            copy.deepcopy,
            pickle.dumps,
            ForkingPickler.dumps,
            lambda model: torch.save(model, tmp_path / "whole.pt"),
        ):
            with pytest.raises(SteeringError, match="copied or pickled while it is steered"):
                copying(found.model)
        found.model.save_pretrained(tmp_path / "model")
        torch.save(found.model.state_dict(), tmp_path / "state.pt")
        assert hooks(found.model) == 1, "the context goes on"
    for saved in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict(),
    ):
        assert saved.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    assert restored(found)
    copied = copy.deepcopy(found.model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(copied))), neutral(found))


def test_a_context_left_while_a_thread_generates_leaves_the_rest_unsteered(found: Planted) -> None:
    streamer = TextIteratorStreamer(found.tokenizer)
    length, failures = 40, []

    def generate() -> None:
        try:
            found.model.generate(
                IDS[:1], max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0, streamer=streamer
            )
        except BaseException as error:
            failures.append(error)
            streamer.end()

    with confsteer.steer(found.model, found.profile, positions="generated", clamp={20: 50.0}):
        thread = threading.Thread(target=generate)
        thread.start()
        words = iter(streamer)
        next(words)
    assert hooks(found.model) == 0
    list(words)
    thread.join()
    assert not failures
    assert restored(found)


def test_threads_steer_models_of_their_own_and_one_of_two_gets_a_shared_one() -> None:
    both = [planted("gpt2"), planted("llama")]
    alone = []
    for found in both:
        with confsteer.steer(found.model, found.profile, STEERINGS[0]):
            alone.append(logits(found.model))

    def steered(found: Planted) -> Tensor:
        with confsteer.steer(found.model, found.profile, STEERINGS[0]):
            for _ in range(5):
                together = logits(found.model)
        return together

    with ThreadPoolExecutor(2) as threads:
        for ours, expected in zip(threads.map(steered, both), alone, strict=True):
            assert torch.equal(ours, expected)
    entered, barrier = [], threading.Barrier(4)

    def enter(number: int) -> None:
        barrier.wait()
        try:
            with confsteer.steer(both[0].model, both[0].profile, STEERINGS[0]):
                entered.append(number)
                barrier.wait()
        except SteeringError:
            barrier.wait()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(enter, range(4)))
    assert len(entered) == 1
    assert all(restored(found) for found in both)


def test_a_forked_process_has_a_steered_model_of_its_own(found: Planted) -> None:
    with confsteer.steer(found.model, found.profile, STEERINGS[0]):
        expected = logits(found.model)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.allclose(logits(found.model), expected, atol=1e-5) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(logits(found.model), expected)
    assert restored(found)
