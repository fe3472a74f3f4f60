"""Windows of generated tokens in transformers: each is a steered call of generate() beside an unsteered one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LlamaForCausalLM

import confsteer
from confsteer import Steering, SteeringError, demo
from confsteer.runtimes.generations import generations
from tests.models import planted_model
from tests.planted import planted
from tests.runtimes.test_passes import IDS, STRONG

NEW = 8
PROMPT = IDS[:1].repeat(1, 3)


def generate(model: Any, ids: Any, tokens: int, steering: Any = None, **how: Any) -> Tensor:
    """Greedy tokens after `ids`."""
    profile = planted(model.config.model_type).profile
    with torch.no_grad(), confsteer.steer(model, profile, {} if steering is None else steering):
        found: Tensor = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **how)
    return found


def own_model(model_type: str) -> Any:
    """A planted model that no other test has, for it may be compiled or changed."""
    model = planted_model(model_type, torch.ones(96))
    model.load_state_dict(planted(model_type).model.state_dict())
    return model


@functools.cache
def windows(model_type: str) -> list[tuple[dict[str, Any], Tensor]]:
    """Steerings of `PROMPT` by a window, and what comes of each, in two calls: the last layer's MLP is in no cache."""
    model = planted(model_type).model
    plain, first = generate(model, PROMPT, NEW), generate(model, PROMPT, 3, STRONG)
    tokens = plain[0, PROMPT.shape[1] :].tolist()
    marker = tokens[1:3]
    # It may come earlier: a tiny model repeats itself.
    end = next(end for end in range(2, NEW) if tokens[end - 2 : end] == marker)
    begun = plain[:, : PROMPT.shape[1] + end]
    found = [
        ({"first": 3}, generate(model, first, NEW - 3)),
        ({"after": marker}, generate(model, begun, NEW - end, STRONG)),
    ]
    for _, answer in found:
        assert not torch.equal(answer, plain)
        assert not torch.equal(answer, generate(model, PROMPT, NEW, STRONG))
    return [({**STRONG, "positions": positions}, answer) for positions, answer in found]


def static(model: Any) -> dict[str, Any]:
    how = CompileConfig(fullgraph=False, backend="eager", mode="default")
    how._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": how}


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 4},
    "assistant": lambda model: {"assistant_model": model},
    "early exit": lambda model: {"assistant_early_exit": 1},
    "compiled with a static cache": static,
    "prompt in chunks": lambda model: {"prefill_chunk_size": 5},
    "without a cache": lambda model: {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_window_is_a_steered_call_beside_an_unsteered_one(model_type: str, way: str) -> None:
    if (model_type, way) == ("gpt2", "early exit"):
        pytest.skip("transformers' GPT-2 runs all its layers, and its cache has no room for them")
    model = own_model(model_type)
    for steering, expected in windows(model_type):
        assert torch.equal(generate(model, PROMPT, NEW, steering, **WAYS[way](model)), expected), steering
    torch._dynamo.reset()


def test_embeddings_in_place_of_a_prompt_and_a_cache_that_goes_on() -> None:
    model, width = planted("llama").model, PROMPT.shape[1]
    for steering, expected in windows("llama"):
        embeddings = {"inputs_embeds": model.get_input_embeddings()(PROMPT)}
        assert torch.equal(generate(model, None, NEW, steering, **embeddings)[0], expected[0, width:])
        # What a call before has generated is prompt, whatever it says.
        cache = DynamicCache(config=model.config)
        before = generate(model, expected, 2, past_key_values=cache)
        again = generate(model, before, 3, steering, past_key_values=cache)
        assert torch.equal(again, generate(model, before, 3, STRONG if "first" in steering["positions"] else None))


def test_a_generate_of_the_model_s_own_may_begin_with_another_prompt() -> None:
    """As LLaVA's does, which makes embeddings of images and ids."""

    def embeds(self: Any, ids: Tensor, **how: Any) -> Any:
        return LlamaForCausalLM.generate(self, inputs_embeds=self.get_input_embeddings()(ids), **how)

    def repeats(self: Any, ids: Tensor, **how: Any) -> Any:
        return LlamaForCausalLM.generate(self, ids.repeat(1, 3), **how)

    model, width = own_model("llama"), PROMPT.shape[1]
    for steering, expected in windows("llama"):
        model.__class__ = type("Embedding", (LlamaForCausalLM,), {"generate": embeds})
        assert torch.equal(generate(model, PROMPT, NEW, steering)[0], expected[0, width:])
        model.__class__ = type("Repeating", (LlamaForCausalLM,), {"generate": repeats})
        assert torch.equal(generate(model, IDS[:1], NEW, steering), expected)


def test_every_row_and_every_beam_goes_by_its_own_tokens() -> None:
    """The rows of `test_generation_fuzz` have one marker each at most; here it comes in one of the rows alone."""
    found = planted("gpt2")
    plain = generate(found.model, IDS, NEW)
    marker = {"after": plain[1, IDS.shape[1] + 1 : IDS.shape[1] + 3].tolist()}
    tokens = generate(found.model, IDS, NEW, {**STRONG, "positions": marker})
    assert torch.equal(tokens[0], plain[0])
    assert not torch.equal(tokens[1], plain[1])


def test_a_pass_that_generates_nothing_is_refused() -> None:
    found = planted("gpt2")
    steering = {**STRONG, "positions": {"first": 2}}
    with confsteer.steer(found.model, found.profile, steering) as steerer:
        with pytest.raises(SteeringError, match=r"positions=first:2 goes by the tokens that generate\(\) generates"):
            found.model(input_ids=IDS)
        found.model.generate(IDS, max_new_tokens=1, pad_token_id=0)
        with pytest.raises(SteeringError, match="this pass is none that it has prepared"):
            found.model(input_ids=IDS[:, :1])
        with pytest.raises(SteeringError, match="this pass is none that it has prepared"):
            found.model.generate(IDS, max_new_tokens=1, pad_token_id=0, guidance_scale=1.5)
        with pytest.raises(SteeringError, match="continuous batching packs"):
            found.model.generate_batch([[1, 2, 3]])
        with pytest.raises(SteeringError, match=r"given 1, 'first:3'\. Give as many and the same, or open"):
            steerer.update({**steering, "positions": {"first": 3}})
    assert "generate" not in vars(found.model)
    assert "prepare_inputs_for_generation" not in vars(found.model)


def test_an_adapted_model_generates_by_the_window() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(own_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for steering, expected in windows("llama"):
        with torch.no_grad(), confsteer.steer(adapted, planted("llama").profile, steering):
            whole: Any = adapted
            tokens = whole.generate(input_ids=PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, expected)


def test_a_text_is_found_in_what_the_model_writes() -> None:
    model, tokenizer, profile = demo.load()
    prompt = "It was the best of times, it was"
    plain, calm = Steering(), Steering(clamp={"entropy": 20.0})
    (first,) = generations(model, tokenizer, profile, prompt, [plain], max_new_tokens=12, temperature=0)
    marker = first.text[9:13]
    after = Steering.parse({"clamp": {"entropy": 20.0}, "positions": {"after": marker}})
    found = generations(model, tokenizer, profile, prompt, [plain, after, calm], max_new_tokens=12, temperature=0)
    assert [one.steering for one in found] == [plain, after, calm]
    assert found[1].text.startswith(first.text[:13])
    assert len({one.text for one in found}) == 3
    with pytest.raises(SteeringError, match="takes the model's tokenizer"), confsteer.steer(model, profile, after):
        pass
