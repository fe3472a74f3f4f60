"""Steering that would be absent: compiled before, captured, packed, padded or drafted passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

import confsteer
from confsteer import Steering, SteeringError
from confsteer.model.dissect import dissect
from confsteer.runtimes.passes import Asked, generating
from tests.models import planted_model
from tests.planted import Planted, planted

IDS = torch.randint(1, 96, (2, 8), generator=torch.Generator().manual_seed(5))
STRONG: Any = {"clamp": {5: 3.0, 20: -40.0}}
"""Moves logits of the planted models far, and its greedy tokens."""


@pytest.fixture(params=["gpt2", "llama"])
def found(request: pytest.FixtureRequest) -> Iterator[Planted]:
    """A planted model of its own, for it may be compiled or changed."""
    shared = planted(request.param)
    model = planted_model(request.param, torch.ones(96))
    model.load_state_dict(shared.model.state_dict())
    torch._dynamo.reset()
    yield shared._replace(model=model)
    torch._dynamo.reset()


def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **kwargs).logits
    return result


def steered(found: Planted, **request: Any) -> Tensor:
    with confsteer.steer(found.model, found.profile, **request):
        return logits(found.model)


def compile_part(model: Any, part: str) -> Any:
    """Compile the whole model or a part of it, beside it or in place; what is to be run."""
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    projection = "c_proj" if model.config.model_type == "gpt2" else "down_proj"
    if part == "whole":
        return torch.compile(model, backend="eager")
    if part == "whole graph":
        return torch.compile(model, backend="eager", fullgraph=True)
    if part == "whole in place":
        model.compile(backend="eager")
    elif part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif part == "last layer":
        layers[-1] = torch.compile(layers[-1], backend="eager")
    elif part == "last MLP in place":
        layers[-1].mlp.compile(backend="eager")
    elif part == "projection":
        setattr(layers[-1].mlp, projection, torch.compile(getattr(layers[-1].mlp, projection), backend="eager"))
    return model


PARTS = ["whole", "whole graph", "whole in place", "forward", "last layer", "last MLP in place", "projection"]


@pytest.mark.parametrize(("part", "by_row"), [(part, number % 2 == 1) for number, part in enumerate(PARTS)])
def test_code_compiled_before_the_context_is_steered_in_it(found: Planted, part: str, by_row: bool) -> None:
    request: list[Any] = [[Steering(**STRONG), Steering()]] if by_row else [Steering(**STRONG)]
    plain = logits(found.model)
    with confsteer.steer(found.model, found.profile, *request):
        expected = logits(found.model)
    compiled = compile_part(found.model, part)
    attributes = {id(module): set(vars(module)) for module in found.model.modules()}
    for context in range(3):
        torch.testing.assert_close(logits(compiled), plain, atol=1e-4, rtol=1e-4)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with confsteer.steer(compiled, found.profile, *request) as steerer:
            torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)
            steerer.update(*([[Steering(), Steering()]] if by_row else []))
            torch.testing.assert_close(logits(compiled), plain, atol=1e-4, rtol=1e-4)
        if context:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before, "code of another context serves again"
    assert {id(module): set(vars(module)) for module in found.model.modules()} == attributes


@pytest.mark.parametrize("part", ["whole graph", "last layer"])
def test_compiled_code_tells_the_positions(found: Planted, part: str) -> None:
    plain, everywhere = logits(found.model), steered(found, **STRONG)
    compiled = compile_part(found.model, part)
    mask = torch.ones_like(IDS)
    with confsteer.steer(compiled, found.profile, **STRONG, positions="generated"):
        for length in (3, 4, 5, 6):
            cache = DynamicCache(config=found.model.config)
            prompt = logits(compiled, IDS[:, :length], past_key_values=cache, attention_mask=mask[:, :length])
            rest = logits(compiled, IDS[:, length:], past_key_values=cache, attention_mask=mask)
            torch.testing.assert_close(prompt[:, :-1], plain[:, : length - 1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(torch.cat([prompt[:, -1:], rest], 1), everywhere[:, length - 1 :], atol=1e-4, rtol=1e-4)
        kept = logits(compiled, logits_to_keep=3)
        torch.testing.assert_close(kept, everywhere[:, -3:], atol=1e-4, rtol=1e-4)


def test_a_static_cache_that_compiles_by_itself_is_steered(found: Planted) -> None:
    how = CompileConfig(fullgraph=False, backend="eager", mode="default")
    how._compile_all_devices = True  # type: ignore[assignment]

    def generate(**cache: Any) -> list[list[int]]:
        tokens: Tensor = found.model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, **cache)
        return tokens.tolist()

    static = {"cache_implementation": "static", "compile_config": how}
    unsteered = generate(**static)
    for positions in ("all", "generated"):
        with confsteer.steer(found.model, found.profile, **STRONG, positions=positions):
            dynamic = generate()
            assert generate(**static) == dynamic != unsteered
            assert generate(prefill_chunk_size=3) == dynamic
    assert generate(**static) == unsteered


def test_compiled_without_guards_is_noticed(found: Planted) -> None:
    layers = found.model.transformer.h if found.model.config.model_type == "gpt2" else found.model.model.layers
    layers[-1].mlp.compile(backend="eager", options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe})
    plain = logits(found.model)
    with (
        confsteer.steer(found.model, found.profile, **STRONG),
        pytest.raises(SteeringError, match="ran without the module that carries the steering"),
    ):
        logits(found.model)
    assert torch.equal(logits(found.model), plain)


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "early exit"])
def test_drafted_tokens_are_verified_with_the_steering(found: Planted, positions: Any, how: str) -> None:
    if how == "early exit" and found.model.config.model_type == "gpt2":
        pytest.skip("transformers' GPT-2 runs all its layers, and its cache has no room for them")
    draft = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": found.model},
        "early exit": {"assistant_early_exit": 1},
    }[how]
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:1].repeat(1, 3)
    unsteered = found.model.generate(ids, **arguments)
    with confsteer.steer(found.model, found.profile, **STRONG):
        expected = found.model.generate(ids, **arguments)
    with confsteer.steer(found.model, found.profile, **STRONG, positions=positions):
        assert torch.equal(found.model.generate(ids, **arguments, **draft), expected)
    assert not torch.equal(unsteered, expected)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 5]), torch.tensor([7], dtype=torch.int32)], ids=str)
def test_positions_whose_logits_are_kept_generate(found: Planted, kept: int | Tensor) -> None:
    """An assistant's tokens are verified in the pass that also holds the prompt, with as many logits as there are tokens."""
    everywhere = steered(found, **STRONG)
    chosen = everywhere[:, -kept:] if isinstance(kept, int) else everywhere[:, kept]
    with confsteer.steer(found.model, found.profile, **STRONG, positions="generated"):
        torch.testing.assert_close(logits(found.model, logits_to_keep=kept), chosen, atol=1e-4, rtol=1e-4)


def test_the_last_token_of_each_text_generates(found: Planted) -> None:
    """Padded on the right or on the left, or several texts in one row."""
    plain, everywhere = logits(found.model), steered(found, **STRONG)
    with confsteer.steer(found.model, found.profile, **STRONG, positions="generated"):
        for side in ("right", "left"):
            mask = torch.ones_like(IDS)
            mask[1, 5:] = 0
            ids = torch.stack([IDS[0], IDS[1] if side == "right" else IDS[1].roll(3)])
            mask = mask if side == "right" else mask.flip(-1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            padded = logits(found.model, ids, attention_mask=mask, position_ids=positions)
            torch.testing.assert_close(padded[0, -1], everywhere[0, -1], atol=1e-4, rtol=1e-4)
            texts = padded[1, :5] if side == "right" else padded[1, 3:]
            torch.testing.assert_close(texts[-1], everywhere[1, 4], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(texts[:-1], plain[1, :4], atol=1e-4, rtol=1e-4)
        packed = logits(found.model, IDS.reshape(1, -1), position_ids=torch.arange(8).repeat(1, 2), use_cache=False)
        torch.testing.assert_close(packed[0, 7::8], everywhere[:, 7], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed[0, :7], plain[0, :7], atol=1e-4, rtol=1e-4)
        with pytest.raises(SteeringError, match="cannot tell from this attention mask"):
            logits(found.model, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool).tril())


def test_an_image_at_the_start_of_a_text_does_not_begin_several() -> None:
    """Parts of an image lie beside each other in time, and only the first is at the start in all dimensions."""
    in_time, in_height, in_width = [0, 0, 0, 0, 2, 3], [0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 3]
    positions = torch.tensor([in_time, in_height, in_width]).repeat(1, 2)[:, None]
    marked = generating(Asked(position_ids=positions), 12, torch.device("cpu"))
    assert marked is not None
    assert marked.nonzero()[:, 1].tolist() == [5, 11]


def test_a_static_cache_is_continued(found: Planted) -> None:
    plain, everywhere = logits(found.model), steered(found, **STRONG)
    with confsteer.steer(found.model, found.profile, **STRONG, positions="generated"):
        cache = StaticCache(found.model.config, max_cache_len=16)
        prompt = logits(found.model, IDS[:, :5], past_key_values=cache, attention_mask=torch.ones(2, 5))
        rest = logits(found.model, IDS[:, 5:], past_key_values=cache, attention_mask=torch.ones(2, 8))
    torch.testing.assert_close(prompt[:, :-1], plain[:, :4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([prompt[:, -1:], rest], dim=1), everywhere[:, 4:], atol=1e-4, rtol=1e-4)


def test_packed_requests_are_steered_alike_or_refused(found: Planted) -> None:
    how = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default the cache takes most of the machine's memory.
    small = {"generation_config": how, "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)}
    prompts = [IDS[0].tolist(), IDS[1, :3].tolist()]
    unsteered = [found.model.generate(torch.tensor([prompt]), generation_config=how)[0, len(prompt) :] for prompt in prompts]
    for positions in ("all", "generated"):
        with confsteer.steer(found.model, found.profile, **STRONG, positions=positions):
            alone = [found.model.generate(torch.tensor([prompt]), generation_config=how)[0, len(prompt) :] for prompt in prompts]
            together = found.model.generate_batch(inputs=prompts, **small)
        assert not any(map(torch.equal, alone, unsteered))
        names = sorted(together, key=lambda name: int(name.rpartition("_")[2]))
        assert [together[name].generated_tokens for name in names] == [tokens.tolist() for tokens in alone]
    with confsteer.steer(found.model, found.profile, [Steering(), Steering(**STRONG)]):
        with pytest.raises(SteeringError, match="continuous batching"):
            found.model.generate_batch(inputs=prompts, **small)
        with pytest.raises(SteeringError, match="continuous batching"):
            found.model.generate(IDS, generation_config=how, cache_implementation="paged")
    assert len(found.model.generate_batch(inputs=prompts, **small)) == 2


def test_captured_graphs_are_not_kept_from_one_context_to_another(found: Planted) -> None:
    """A persistent manager of continuous batching replays its CUDA graphs, where there is CUDA."""
    how = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = {"generation_config": how, "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)}

    def run() -> Any:
        found.model.generate_batch(inputs=[IDS[0].tolist()], **small, persistent_manager=True)
        return found.model._cached_continuous_batching_manager.continuous_batching_config

    run()
    with confsteer.steer(found.model, found.profile, **STRONG):
        run().use_cuda_graph = True
    assert not hasattr(found.model, "_cached_continuous_batching_manager")
    run().use_cuda_graph = True
    with pytest.raises(SteeringError, match="destroy_cached"), confsteer.steer(found.model, found.profile, **STRONG):
        pass
    found.model.destroy_cached_continuous_batching_manager()
    with confsteer.steer(found.model, found.profile, **STRONG):
        pass


def test_checkpointed_gradients_are_those_of_the_steered_model_or_refused(found: Planted) -> None:
    gradients = []
    embedding = found.model.get_input_embeddings()
    found.model.config.use_cache = False
    for checkpointed in (False, True):
        if checkpointed:
            found.model.gradient_checkpointing_enable()
        found.model.train()
        with confsteer.steer(found.model, found.profile, [Steering(), Steering(scale={5: 3.0})]):
            torch.manual_seed(0)
            found.model(input_ids=IDS).logits.square().mean().backward()
        gradients.append(embedding.weight.grad)
        found.model.zero_grad()
    torch.testing.assert_close(*gradients)
    with (
        confsteer.steer(found.model, found.profile, scale={5: 3.0}, positions="generated"),
        pytest.raises(SteeringError, match="gradient checkpointing"),
    ):
        found.model(input_ids=IDS).logits.square().mean().backward()


def replace_projection(model: Any) -> None:
    """Put another layer with the same weights in the place of the last projection."""
    projection = dissect(model).down_proj
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is projection:
                other = type(projection)(*projection.weight.shape[::-1])
                other.load_state_dict(projection.state_dict(), strict=False)
                setattr(parent, name, other)
                return


def freeze_output(model: Any) -> None:
    """Give what was given once, as a captured graph does."""
    output = model(input_ids=IDS)
    model.forward = lambda *args, **kwargs: output


@pytest.mark.parametrize("change", [replace_projection, freeze_output])
def test_a_pass_that_is_not_steered_is_noticed(found: Planted, change: Callable[[Any], None]) -> None:
    dissect(found.model)
    if change is freeze_output:
        change(found.model)
    with confsteer.steer(found.model, found.profile, **STRONG):
        if change is replace_projection:
            logits(found.model)
            change(found.model)
        with pytest.raises(SteeringError, match="ran without the module that carries the steering"):
            logits(found.model)
    logits(found.model)


def test_a_steered_model_is_not_exported(found: Planted) -> None:
    with confsteer.steer(found.model, found.profile, **STRONG):
        for export in (
            lambda: torch.export.export(found.model, (IDS,), strict=False),
            lambda: torch.jit.trace(found.model, (IDS,), strict=False),
        ):
            with pytest.raises(SteeringError, match="exported or traced while it is steered"):
                export()


def test_whoever_wraps_forward_within_the_context_keeps_an_unsteered_model(found: Planted) -> None:
    plain = logits(found.model)
    with confsteer.steer(found.model, found.profile, **STRONG):
        inner = found.model.forward
        found.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        assert not torch.equal(logits(found.model), plain)
    assert torch.equal(logits(found.model), plain)


def test_torch_defaults_do_not_matter(found: Planted) -> None:
    expected = steered(found, **STRONG)
    fresh = planted_model(found.model.config.model_type, torch.ones(96))
    fresh.load_state_dict(found.model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            context = confsteer.steer(fresh, found.profile, positions="generated")
            steerer = context.__enter__()
            steerer.update(**STRONG, positions="generated")
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        assert torch.equal(torch.get_rng_state(), state)
        steerer.update(**STRONG, positions="generated")
        output = fresh(input_ids=IDS).logits
        torch.testing.assert_close(output[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
        output.sum().backward()
    finally:
        context.__exit__(None, None, None)
