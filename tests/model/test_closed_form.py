"""Numbers of another model: every way in which a model may be another than its last layer was folded of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import confsteer
from confsteer import Steering, SteeringError, UnsupportedModelError
from confsteer.evaluation.choices import evaluate_choices
from confsteer.evaluation.evaluate import evaluate
from confsteer.model.dissect import dissect
from confsteer.model.states import CHECKED_TOKENS, Recording, check_closed_form, record, record_continuations
from confsteer.studies.cumulative import cumulative
from confsteer.studies.heads import bos_ablation
from confsteer.studies.induction import induction
from confsteer.studies.repetition import Repetition
from confsteer.text.questions import Question
from confsteer.text.windows import make_windows
from confsteer.tuning.tune import tune
from tests.models import FAMILIES, VOCAB, TinyFamily, tiny_model, tiny_tokenizer, zipf_texts
from tests.planted import Planted, planted

CPU = torch.device("cpu")
TEXTS = zipf_texts(4, 60, seed=5)
IDS = torch.randint(1, VOCAB, (24,), generator=torch.Generator().manual_seed(3))
QUESTIONS = [Question("t1 t2 t3", ("t4", "t5 t6"), 0), Question("t7 t8", ("t9 t10", "t11"), 1)]
MEASURED: dict[str, Callable[[Planted], object]] = {
    "calibrate": lambda p: confsteer.calibrate(p.model, p.tokenizer, p.texts, window=64),
    "evaluate": lambda p: evaluate(p.model, p.tokenizer, TEXTS, p.profile, [Steering(entropy=0.2)], window=64),
    "choices": lambda p: evaluate_choices(p.model, p.tokenizer, {"q": QUESTIONS}, p.profile, []),
    "tune": lambda p: tune(p.model, p.tokenizer, p.texts, p.profile, window=64),
    "cumulative": lambda p: cumulative(p.model, make_windows(TEXTS, p.tokenizer, window=64), p.profile, repeats=1),
    "induction": lambda p: induction(p.model, p.tokenizer, p.profile, repeat=Repetition(2, 16)),
    "heads": lambda p: bos_ablation(p.model, p.tokenizer, p.profile, repeat=Repetition(2, 16)),
}


def copied(model_type: str = "llama") -> Planted:
    """A planted model of one's own, to be changed."""
    found = planted(model_type)
    return found._replace(model=copy.deepcopy(found.model))


@pytest.mark.parametrize("measure", MEASURED)
def test_nothing_is_measured_of_a_steered_model(measure: str) -> None:
    found = copied("gpt2")
    for steering in (Steering(entropy=0.2), Steering(entropy=0.2, positions="generated")):
        with (
            confsteer.steer(found.model, found.profile, steering),
            pytest.raises(SteeringError, match=r"being steered.*Leave the context first"),
        ):
            MEASURED[measure](found)
    assert MEASURED[measure](found)


def test_a_neutral_context_changes_no_number() -> None:
    found = copied()
    outside = MEASURED["evaluate"](found)
    with confsteer.steer(found.model, found.profile):
        assert MEASURED["evaluate"](found) == outside


def test_a_context_that_opens_while_a_text_is_read_is_noticed() -> None:
    found = copied()
    anatomy = dissect(found.model)
    batches = Recording(found.model, anatomy, make_windows(found.texts, found.tokenizer, window=64), CPU).read()
    next(batches)
    with confsteer.steer(found.model, found.profile, entropy=0.2), pytest.raises(SteeringError, match="being steered"):
        next(batches)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_that_writes_into_the_activations_is_noticed(mode: Any) -> None:
    found = copied()
    anatomy = dissect(found.model)

    def silence(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0][..., 5] = 0

    handle = anatomy.down_proj.register_forward_pre_hook(silence)
    with mode(), pytest.raises(SteeringError, match="being steered"):
        check_closed_form(found.model, anatomy, IDS)
    handle.remove()
    check_closed_form(found.model, anatomy, IDS)


class NormInHead(LlamaForCausalLM):
    """A Llama whose body ends before its final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        self.final_norm, self.model.norm = self.model.norm, nn.Identity()

    def forward(self, **inputs: Any) -> CausalLMOutputWithPast:
        body = self.model(**inputs)
        logits = self.lm_head(self.final_norm(body.last_hidden_state))
        return CausalLMOutputWithPast(logits=logits, past_key_values=body.past_key_values)


@pytest.mark.parametrize("measure", ["calibrate", "evaluate", "choices"])
def test_a_final_norm_outside_the_body_is_run(measure: str) -> None:
    found = copied()
    model: Any = NormInHead(found.model.config)
    names = {"model.norm.weight": "final_norm.weight"}
    model.load_state_dict({names.get(name, name): weight for name, weight in found.model.state_dict().items()})
    assert MEASURED[measure](found._replace(model=model.eval())) == MEASURED[measure](found)


def adapted(model: Any, targets: Sequence[str], **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), **{"init_lora_weights": False} | settings)).eval()


@pytest.mark.parametrize(("target", "place"), [("lm_head", "unembedding"), ("model.layers.1.mlp.down_proj", "projection")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_the_closed_form_leaves_out_are_refused(target: str, place: str, dtype: torch.dtype) -> None:
    base = tiny_model("llama", {f.model_type: f.config for f in FAMILIES}["llama"]).to(dtype)
    # Far below what rounding in half precision hides.
    model = adapted(base, [target], lora_alpha=1e-2)
    with pytest.raises(UnsupportedModelError, match=rf"adapters \(PEFT\) on its .*{place}.*merge_and_unload"):
        check_closed_form(model, dissect(model), IDS)
    with model.disable_adapter():
        check_closed_form(model, dissect(model), IDS)
    merged = model.merge_and_unload()
    check_closed_form(merged, dissect(merged), IDS)


def test_adapters_that_the_states_show_are_measured() -> None:
    """On the attention, or on the last projection before any training of it: the closed form is the adapted model's."""
    found = copied()
    model = adapted(found.model, ["q_proj"])
    readout = dissect(model).readout()
    windows = make_windows(TEXTS, found.tokenizer, window=64)
    states = record(model, dissect(model), windows, torch.arange(4), CPU, readout=readout)
    theirs = []
    for batch in windows.batches(4):
        with torch.no_grad():
            theirs.append(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.kept])
    torch.testing.assert_close(
        readout.logits(states.residual).log_softmax(-1), torch.cat(theirs).log_softmax(-1), atol=1e-4, rtol=1e-4
    )
    untrained = adapted(copied().model, ["down_proj"], init_lora_weights=True)
    check_closed_form(untrained, dissect(untrained), IDS)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_tokens_that_an_adapter_puts_before_the_text_are_noticed(kind: str) -> None:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(copied("gpt2").model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(UnsupportedModelError, match="in another way than its body"):
        check_closed_form(model, dissect(model), IDS)


def test_what_happens_to_logits_after_the_first_check_is_noticed() -> None:
    found = copied()
    anatomy = dissect(found.model)
    for module in (found.model.lm_head, found.model):

        def cool(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return output * 1.2
            output.logits = output.logits * 1.2
            return output

        handle = module.register_forward_hook(cool)
        with pytest.raises(UnsupportedModelError, match="logits are not its unembedding"):
            record_continuations(found.model, anatomy, [([1, 2, 3], [4])], torch.arange(2), CPU)
        handle.remove()
    record_continuations(found.model, anatomy, [([1, 2, 3], [4])], torch.arange(2), CPU)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "falcon"])
def test_what_happens_to_a_neurons_write_after_the_first_check_is_noticed(model_type: str) -> None:
    model = tiny_model(model_type, {f.model_type: f.config for f in FAMILIES}[model_type])
    anatomy = dissect(model)
    mlp = anatomy.last_layer.get_submodule("mlp")
    direction = torch.nn.functional.normalize(torch.randn(anatomy.d_model), dim=0)
    for module in (mlp, anatomy.down_proj):
        # As ablating a direction does it.
        handle = module.register_forward_hook(lambda m, args, output: output - (output @ direction)[..., None] * direction)
        with pytest.raises(UnsupportedModelError, match="does not move the residual by its output weights"):
            check_closed_form(model, anatomy, IDS)
        handle.remove()
    check_closed_form(model, anatomy, IDS)


def test_a_context_inside_an_adapter_is_noticed() -> None:
    found = copied()
    with confsteer.steer(found.model, found.profile, entropy=0.2):
        model = adapted(found.model, ["down_proj"], init_lora_weights=True)
        with pytest.raises(SteeringError, match="being steered"):
            check_closed_form(model, dissect(model), IDS)


def test_weights_that_change_after_they_were_folded_are_noticed() -> None:
    found = copied()
    anatomy = dissect(found.model)
    readout = anatomy.readout()
    for parameter in (found.model.lm_head.weight, anatomy.down_proj.weight, anatomy.final_norm.weight):
        assert isinstance(parameter, nn.Parameter)
        check_closed_form(found.model, anatomy, IDS, readout)
        kept = parameter.detach().clone()
        parameter.data.mul_(1.01)
        with pytest.raises(UnsupportedModelError, match="changed since they were read"):
            check_closed_form(found.model, anatomy, IDS, readout)
        parameter.data.copy_(kept)


def test_another_readout_than_the_models_is_noticed() -> None:
    found = copied()
    anatomy = dissect(found.model)
    other = dissect(tiny_model("llama", {f.model_type: f.config for f in FAMILIES}["llama"], seed=1)).readout()
    with pytest.raises(UnsupportedModelError, match="logits are not its unembedding"):
        check_closed_form(found.model, anatomy, IDS, other)


def test_outputs_that_are_not_finite_are_named() -> None:
    found = copied()
    dissect(found.model)
    found.model.model.embed_tokens.weight.data[int(IDS[1])] = torch.inf
    with pytest.raises(UnsupportedModelError, match="not finite on this text"):
        check_closed_form(found.model, dissect(found.model), IDS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_closed_form_of_every_family_holds_on_texts_of_any_length(family: TinyFamily, dtype: torch.dtype) -> None:
    model = tiny_model(*family).to(dtype)
    anatomy = dissect(model)
    for length in (1, 2, 3, 4, CHECKED_TOKENS, 24):
        check_closed_form(model, anatomy, IDS[:length])


def test_a_recording_is_checked_once_and_runs_the_model_no_more_than_that() -> None:
    found = copied()
    lengths: list[int] = []
    found.model.model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    windows = make_windows(found.texts, tiny_tokenizer(), window=64)
    one = Recording(found.model, dissect(found.model), windows, CPU, readout=dissect(found.model).readout())
    lengths.clear()
    for _ in range(2):
        list(one.read())
    batches = [batch.input_ids.numel() for batch in windows.batches(4)]
    assert lengths == [CHECKED_TOKENS] * 3 + batches
    assert not any(module._forward_pre_hooks for module in found.model.model.layers.modules())


def test_nothing_is_compiled_for_the_check() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    found = copied()
    check_closed_form(torch.compile(found.model, backend=backend), dissect(found.model), IDS)  # type: ignore[arg-type]
    found.model.compile(backend=backend)
    check_closed_form(found.model, dissect(found.model), IDS)
    found.model.forward = torch.compile(found.model.forward, backend=backend)
    check_closed_form(found.model, dissect(found.model), IDS)
    assert not compiled
    torch._dynamo.reset()
