from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from confsteer import NoNeuronsError, Profile, demo
from confsteer.model.dissect import dissect
from confsteer.studies.heads import HeadStudy, ablated, bos_ablation, induction_scores
from confsteer.studies.repetition import Repetition, random_stretches, read_twice
from tests.models import FAMILIES, VOCAB, TinyFamily, tiny_model, tiny_tokenizer
from tests.planted import planted

LAYERS, HEADS = 2, 4


def copied(model_type: str) -> tuple[Any, PreTrainedTokenizerFast, Profile]:
    """A planted model of one's own: asking for attentions, transformers leaves hooks behind."""
    model, tokenizer, _, profile = planted(model_type)
    return copy.deepcopy(model), tokenizer, profile


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_without_its_heads_a_position_sees_itself_and_the_first(family: TinyFamily) -> None:
    """True of every family only if the right module is hooked; and leaving the context restores the model."""
    model = tiny_model(*family)
    anatomy = dissect(model)
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 1:6] = (other[:, 1:6] + 7) % VOCAB
    before = logits(model, ids)
    with ablated(model, anatomy, [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]):
        torch.testing.assert_close(logits(model, ids)[:, 6:], logits(model, other)[:, 6:])
    with ablated(model, anatomy, [(0, 1), (1, 2)]):
        assert (logits(model, ids)[:, 6:] - logits(model, other)[:, 6:]).abs().max() > 1e-3
    with ablated(model, anatomy, []):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox"])
def test_it_is_a_one_hot_attention_row(model_type: str) -> None:
    """Against an attention function that puts the value of position 0 in the place of some heads' outputs."""
    model = tiny_model(*next(f for f in FAMILIES if f.model_type == model_type))
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))

    def one_hot(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)  # [batch, positions, heads, d]
        for head in {0: [1, 3], 1: [2]}[module.layer_idx]:
            output[:, :, head] = value[:, head * value.shape[1] // query.shape[1], :1]
        return output, weights

    with ablated(model, dissect(model), [(0, 1), (1, 2), (0, 3)]):
        ours = logits(model, ids)
    AttentionInterface.register("one_hot_test", one_hot)
    AttentionMaskInterface.register("one_hot_test", sdpa_mask)
    model.set_attn_implementation("one_hot_test")
    torch.testing.assert_close(ours, logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_scores_are_attention_to_what_came_next(family: TinyFamily) -> None:
    model, half = tiny_model(*family), 10
    usual = model.config._attn_implementation
    windows = read_twice(tiny_tokenizer(), random_stretches(tiny_tokenizer(), VOCAB, 5, half), "uniform tokens")
    scores = induction_scores(model, windows, half)
    assert scores.shape == (LAYERS, HEADS)
    assert model.config._attn_implementation == usual
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.from_numpy(windows.token_ids.reshape(5, -1)).long()
        attentions = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        expected = torch.stack([weights[:, :, i, i - half + 1] for i in range(half, 2 * half)]).mean(dim=(0, 1))
        torch.testing.assert_close(scores[layer].float(), expected, atol=1e-5, rtol=1e-4)


def test_the_bundled_models_neurons_hear_of_repetition_through_its_induction_heads() -> None:
    model, tokenizer, profile = demo.load()
    study = bos_ablation(model, tokenizer, profile, repeat=Repetition(4))
    assert study.heads == ((1, 0), (1, 2), (1, 3))
    assert study.loss.nats.low > 3
    for neuron in study.neurons:
        change = neuron.second_mean - neuron.first_mean
        # Most of what repetition did is undone.
        assert neuron.change.value / -change > 0.5
        assert neuron.change.low <= neuron.change.value <= neuron.change.high
    assert HeadStudy.model_validate_json(study.model_dump_json()) == study


def test_means_are_those_of_the_induction_study() -> None:
    from confsteer.studies.induction import induction

    model, tokenizer, profile = copied("gpt2")
    study = bos_ablation(model, tokenizer, profile, repeat=Repetition(4, 20))
    (kind,) = induction(model, tokenizer, profile, repeat=Repetition(4, 20)).kinds
    for ours, theirs in zip(study.neurons, kind.neurons, strict=True):
        assert ours.first_mean == pytest.approx(theirs.first_mean)
        assert ours.second_mean == pytest.approx(theirs.second_mean)


def test_a_model_without_induction_heads_has_nothing_ablated() -> None:
    model, tokenizer, profile = copied("llama")
    study = bos_ablation(model, tokenizer, profile, repeat=Repetition(4, 20))
    assert study.heads == ()
    assert study.entropy.nats == (0, 0, 0)
    assert all(neuron.change == (0, 0, 0) for neuron in study.neurons)


def test_a_profile_without_entropy_neurons_is_refused() -> None:
    model, tokenizer, profile = copied("llama")
    without = profile.model_copy(update={"entropy_neurons": (), "response": {}})
    with pytest.raises(NoNeuronsError, match="no entropy neurons"):
        bos_ablation(model, tokenizer, without)
