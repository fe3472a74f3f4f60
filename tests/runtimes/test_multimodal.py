"""Models that see: steered through the language model inside, whether there is an image in the prompt or not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText

import confsteer
from confsteer import SettingError, Steering, UnsupportedModelError
from confsteer.calibration.scan import scan
from confsteer.evaluation.evaluate import evaluate
from confsteer.model.dissect import dissect
from confsteer.model.loading import load_model
from confsteer.steering import First
from confsteer.text.windows import make_windows
from tests.models import (
    ENTROPY_NEURONS,
    FREQUENCY_NEURON,
    FREQUENCY_SIGN,
    IMAGE,
    IMAGE_TOKENS,
    MULTIMODAL,
    VOCAB,
    image_inputs,
)
from tests.planted import Planted, planted

IDS = torch.tensor(
    [
        [3, 93, *[IMAGE] * IMAGE_TOKENS, 92, 8, 5],
        [0, 0, 0, *[IMAGE] * IMAGE_TOKENS, 92, 7],
        [0, 0, 0, 0, 0, 4, 9, 11, 2],
    ]
)
"""A prompt with an image in it, one that begins with an image, and one without; padded on the left."""
PADDING = (0, 3, 5)
STEERINGS = [Steering(clamp={5: 3.0}), Steering(scale={5: -2.0, 11: 0.0}, shift={20: 0.5}), Steering()]
FOUND = pytest.mark.parametrize("model_type", [family.model_type for family in MULTIMODAL])


def logits(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of the whole text at once, with its images, ``[rows, positions, vocab]``."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **image_inputs(model.config.model_type, ids), use_cache=False).logits
    return result


@contextlib.contextmanager
def edited_by_hand(found: Planted, steering: Steering, first: int) -> Iterator[None]:
    """Edit the activations from a position on, in the language model's last layer, which is named here."""
    gain, bias, low, high = (torch.from_numpy(np.asarray(column)) for column in found.profile.edit(steering))
    neurons = [neuron.index for neuron in found.profile.steerable]

    def edit(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        changed = args[0].clone()
        changed[:, first:, neurons] = (gain * changed[:, first:, neurons] + bias).clamp(low, high)
        return (changed,)

    body = found.model.model
    language_model = body.text_model if found.model.config.model_type == "smolvlm" else body.language_model
    handle = language_model.layers[-1].mlp.down_proj.register_forward_pre_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@FOUND
def test_exactly_the_planted_neurons_are_found_on_a_text(model_type: str) -> None:
    profile = planted(model_type).profile
    assert {n.index: n.sign for n in profile.entropy_neurons} == ENTROPY_NEURONS
    assert {n.index: n.sign for n in profile.frequency_neurons} == {FREQUENCY_NEURON: FREQUENCY_SIGN}


@FOUND
@pytest.mark.parametrize("positions", ["all", "generated", First(first=2)], ids=str)
def test_prompts_with_images_are_continued_by_the_rule(model_type: str, positions: Literal["all", "generated"] | First) -> None:
    """A batch of cached generation against each prompt alone, read again whole for every token and edited by hand."""
    found = planted(model_type)
    mask = torch.arange(IDS.shape[1]) >= torch.tensor(PADDING)[:, None]
    asked = {"input_ids": IDS, "attention_mask": mask.long(), **image_inputs(model_type, IDS)}
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    steerings = [steering.model_copy(update={"positions": positions}) for steering in STEERINGS]
    with confsteer.steer(found.model, found.profile, steerings):
        together = found.model.generate(**asked, **how, output_logits=True, return_dict_in_generate=True)
    for row, steering in enumerate(STEERINGS):
        ids = IDS[row : row + 1, PADDING[row] :]
        first = 0 if positions == "all" else ids.shape[1] - 1
        for step in range(4):
            plain = logits(found.model, ids)[0, -1]
            inside = not isinstance(positions, First) or step < positions.first
            with edited_by_hand(found, steering if inside else Steering(), first):
                expected = logits(found.model, ids)[0, -1]
            torch.testing.assert_close(together.logits[step][row], expected, atol=1e-5, rtol=1e-5)
            assert (steering == Steering() or not inside) == torch.equal(plain, expected), "a test without teeth"
            ids = torch.cat([ids, expected.argmax()[None, None]], dim=1)


@FOUND
def test_a_checkpoint_is_loaded_scanned_and_evaluated_as_it_is(model_type: str, tmp_path: Path) -> None:
    found = planted(model_type)
    found.save(tmp_path)
    loaded = load_model(str(tmp_path / "model"))
    assert type(loaded.model) is type(found.model)
    assert torch.equal(logits(loaded.model, IDS), logits(found.model, IDS))
    scanned = scan(str(tmp_path / "model")).profile
    assert scanned.model.fingerprints == found.profile.model.fingerprints
    for name in ("norm", "null_fraction", "logit_variance"):
        assert torch.equal(scanned.columns[name], found.profile.columns[name])
    windows = make_windows(found.texts[:4], found.tokenizer, window=32)
    report = evaluate(loaded.model, loaded.tokenizer, windows, found.profile, [Steering(entropy=0.05)])
    losses = []
    for batch in windows.batches(4):
        with torch.no_grad():
            output = found.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        losses.append(cross_entropy(output[batch.kept], batch.targets, reduction="none"))
    unsteered = report.texts[0].rows[0]
    assert unsteered.metrics["loss"].value == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("model_type", "steering"),
    [("llava", "entropy=0.2"), ("smolvlm", "shift.5=0.3"), ("gemma3", "clamp.5=0"), ("qwen2_5_vl", "clamp.5=0")],
)
def test_a_baked_model_sees_as_a_steered_one(model_type: str, steering: str) -> None:
    found = planted(model_type)
    with confsteer.steer(found.model, found.profile, steering):
        expected = logits(found.model, IDS)
    model = copy.deepcopy(found.model)
    confsteer.bake(model, found.profile, steering)
    torch.testing.assert_close(logits(model, IDS), expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(expected, logits(found.model, IDS), atol=1e-3)


def test_a_model_that_reads_no_text_alone_is_steered_by_the_one_inside() -> None:
    text = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCAB}
    seen = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"qformer_config": seen | {"encoder_hidden_size": 32}, "vision_config": seen | {"image_size": 28, "patch_size": 14}}
    config = AutoConfig.for_model("blip-2", text_config=text, **sizes, num_query_tokens=IMAGE_TOKENS, image_token_index=IMAGE)
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"text alone: .*pixel_values.* Give .*: model\.language_model$"):
        dissect(model)
    anatomy = dissect(model.language_model)
    identity = {"n_neurons": anatomy.n_neurons, "vocab_size": anatomy.vocab_size, "fingerprints": anatomy.fingerprints()}
    profile = planted("gpt2").profile
    profile = profile.model_copy(update={"model": profile.model.model_copy(update=identity)})
    ids, image = torch.tensor([[*[IMAGE] * IMAGE_TOKENS, 5, 7]]), torch.randn(1, 3, 28, 28)
    with torch.no_grad(), confsteer.steer(model.language_model, profile, clamp={5: 3.0}):
        steered = model(input_ids=ids, pixel_values=image).logits
    with torch.no_grad():
        anatomy.down_proj.register_forward_pre_hook(lambda module, args: (args[0].index_fill(-1, torch.tensor([5]), 3.0),))
        torch.testing.assert_close(steered, model(input_ids=ids, pixel_values=image).logits)


def test_the_context_is_that_of_the_language_model() -> None:
    found = planted("llava")
    with pytest.raises(SettingError, match="64"):
        confsteer.calibrate(found.model, found.tokenizer, found.texts, window=65)
