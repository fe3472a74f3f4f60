"""Calibration and evaluation on conversations with images, against the whole model that is given the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import confsteer
from confsteer import Profile, Steering, UnsupportedModelError
from confsteer.evaluation.evaluate import Evaluation, evaluate
from confsteer.model.dissect import dissect
from confsteer.model.states import record
from confsteer.text.images import with_images
from confsteer.text.windows import FIRST_POSITIONS, SeenConversation, Windows, make_windows
from tests.models import IMAGE, IMAGE_TOKENS, MULTIMODAL, VOCAB, chat_tokenizer, image_inputs, tiny_processor, zipf_texts
from tests.planted import Planted, planted
from tests.test_cli import run
from tests.text.test_images import picture

FOUND = pytest.mark.parametrize("model_type", [family.model_type for family in MULTIMODAL])


def conversations(model_type: str) -> list[SeenConversation | str]:
    """Texts, and ids with an image of their own, two in the last."""
    generator = torch.Generator().manual_seed(3)
    made: list[SeenConversation | str] = [*zipf_texts(2, 40)]
    # A black image of SmolVLM is none, and its inputs are an image for each row: it sees one.
    for number, images in enumerate((1, 1, 1 if model_type == "smolvlm" else 2), start=1):
        words = torch.randint(1, 90, (20 + 5 * number,), generator=generator).tolist()
        ids = [*words[:4], *([93, *[IMAGE] * IMAGE_TOKENS, 92] * images), *words[4:]]
        inputs = image_inputs(model_type, torch.tensor([ids]))
        inputs = {name: number * value if value.is_floating_point() else value for name, value in inputs.items()}
        made += [SeenConversation(ids, inputs, frozenset({IMAGE}), f"conversation {number}"), *zipf_texts(1, 40, seed=number)]
    return made


def whole_model(found: Planted, windows: Windows, steering: Steering | None = None) -> dict[str, Tensor]:
    """Run the whole model on each window alone. Hooks that name their place give its states at the positions that count."""
    body = found.model.model
    language_model = body.text_model if found.model.config.model_type == "smolvlm" else body.language_model
    seen: dict[str, Tensor] = {}
    hooks = [
        language_model.norm.register_forward_pre_hook(lambda m, args: seen.update(residual=args[0])),
        language_model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(activations=args[0])),
    ]
    rows: dict[str, list[Tensor]] = {name: [] for name in ("residual", "activations", "logits", "targets", "window")}
    try:
        for number in range(len(windows)):
            ids = torch.from_numpy(windows.token_ids[windows.starts[number] : windows.starts[number + 1]]).long()[None]
            with torch.no_grad(), confsteer.steer(found.model, found.profile, steering or Steering()):
                seen["logits"] = found.model(input_ids=ids, **windows.inputs.get(number, {}), use_cache=False).logits
            counts = [
                i
                for i in range(FIRST_POSITIONS, ids.shape[1] - 1)
                if not {IMAGE, 0} & set(ids[0, i : i + 1].tolist()) and int(ids[0, i + 1]) != IMAGE and int(ids[0, i - 1]) != 0
            ]
            for name, value in seen.items():
                rows[name].append(value[0, counts])
            rows["targets"].append(ids[0, [i + 1 for i in counts]])
            rows["window"].append(torch.full((len(counts),), number))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(values) for name, values in rows.items()}


@FOUND
def test_states_are_those_of_the_whole_model_with_the_same_images(model_type: str) -> None:
    found = planted(model_type)
    anatomy = dissect(found.model)
    windows = make_windows(conversations(model_type), found.tokenizer, window=48)
    states = record(found.model, anatomy, windows, torch.arange(anatomy.n_neurons), torch.device("cpu"))
    expected = whole_model(found, windows)
    assert torch.equal(states.targets, expected["targets"])
    assert torch.equal(states.window, expected["window"])
    torch.testing.assert_close(states.residual, expected["residual"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states.activations, expected["activations"], atol=1e-5, rtol=1e-5)
    blind = make_windows(
        [one if isinstance(one, str) else one._replace(inputs={}) for one in conversations(model_type)],
        found.tokenizer,
        window=48,
    )
    unseen = record(found.model, anatomy, blind, torch.tensor([0]), torch.device("cpu"))
    assert not torch.allclose(unseen.residual, states.residual, atol=1e-3), "a test without teeth"


@FOUND
def test_an_evaluation_is_that_of_the_steered_model_that_sees(model_type: str) -> None:
    found = planted(model_type)
    windows = make_windows(conversations(model_type), found.tokenizer, window=48)
    steering = Steering(clamp={5: 1.0}, shift={20: 0.3})
    (result,) = evaluate(found.model, found.tokenizer, windows, found.profile, [steering]).texts
    for row in (*result.of_kind("neutral"), *result.of_kind("steering")):
        expected = whole_model(found, windows, row.steering)
        loss = float(cross_entropy(expected["logits"], expected["targets"]))
        assert row.metrics["loss"].value == pytest.approx(loss, abs=1e-5)


def test_a_profile_of_what_was_seen(tmp_path: Path) -> None:
    """By command, on a checkpoint with its processor: the same as in Python, and another than without the images."""
    found, processor = planted("llava"), tiny_processor("llava")
    found.model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    texts = [text.replace("t9", "t2") for text in zipf_texts(24, 14)]  # no word that stands for an image
    chats: list[Any] = [
        [
            {
                "role": "t5",
                "content": [
                    {"type": "image", "path": str(picture(tmp_path / f"{i}.png", seed=i, size=(20 + i, 30)))},
                    {"type": "text", "text": text},
                ],
            },
            {"role": "t6", "content": text},
        ]
        for i, text in enumerate(texts)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    text = ("--text", tmp_path / "chats.jsonl", "--chat", "--window", 40)
    run("calibrate", tmp_path / "model", *text, "--out", tmp_path / "profile")
    profile = Profile.load(tmp_path / "profile")
    assert profile.corpus is not None
    windows = make_windows(with_images(chats, processor), processor.tokenizer, window=40, source=profile.corpus.source)
    counts = windows.counts(VOCAB).numpy()
    ours = confsteer.calibrate(found.model, processor.tokenizer, windows, unigram_counts=counts)
    assert (ours.corpus, ours.steerable, ours.response) == (profile.corpus, profile.steerable, profile.response)
    assert profile.corpus.sha256 == windows.sha256
    sees = whole_model(found, windows)["activations"].double()
    torch.testing.assert_close(profile.columns["mean_activation"].double(), sees.mean(dim=0), atol=1e-5, rtol=1e-5)
    only_ids = [one._replace(inputs={}) for one in with_images(chats, processor) if isinstance(one, SeenConversation)]
    blind = confsteer.calibrate(found.model, processor.tokenizer, only_ids, window=40, unigram_counts=counts)
    assert (blind.columns["mean_activation"] - profile.columns["mean_activation"]).abs().max() > 1e-4
    run("eval", tmp_path / "model", "-p", tmp_path / "profile", *text, "-s", "entropy=0.05", "--json", tmp_path / "eval.json")
    (result,) = Evaluation.model_validate_json((tmp_path / "eval.json").read_bytes()).texts
    seen = whole_model(found, windows)
    (neutral,) = result.of_kind("neutral")
    assert neutral.metrics["loss"].value == pytest.approx(float(cross_entropy(seen["logits"], seen["targets"])), abs=1e-5)


def test_a_model_that_reads_text_alone_says_so(tmp_path: Path) -> None:
    found = planted("llama")
    found.model.save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text(json.dumps([{"role": "t5", "content": [{"type": "image", "path": "a.png"}]}]))
    said = run("calibrate", tmp_path / "model", "--text", tmp_path / "chats.jsonl", "--chat", code=1).output
    assert "has no processor for images: it reads text alone" in " ".join(said.split())
    counted = ("--text", tmp_path / "chats.jsonl", "--chat", "--out", tmp_path / "counts.npy")
    assert "part that is no text (type 'image')" in " ".join(run("count", tmp_path / "model", *counted, code=1).output.split())


def test_pixels_come_in_the_precision_of_the_weights() -> None:
    found = planted("llava")
    windows = make_windows(conversations("llava"), found.tokenizer, window=48)
    exact, half = (
        record(model, dissect(model), windows, torch.tensor([5]), torch.device("cpu")).residual.float()
        for model in (found.model, copy.deepcopy(found.model).bfloat16())
    )
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    found, (*_, seen, _) = planted("llava"), conversations("llava")
    assert isinstance(seen, SeenConversation)
    pixels = seen.inputs["pixel_values"]
    for inputs, why in (({"pixels": pixels}, "other pixels change nothing"), ({"pixel_values": pixels[:1]}, "do not match")):
        windows = make_windows([seen._replace(inputs=inputs)], found.tokenizer, window=48)
        with pytest.raises(UnsupportedModelError, match=f"llava does not take .*{why}"):
            record(found.model, dissect(found.model), windows, torch.tensor([5]), torch.device("cpu"))


def test_a_body_that_sees_otherwise_than_the_model_is_refused() -> None:
    """The check covers positions of images too, not only the text before them."""
    found = planted("llava")
    windows = make_windows(conversations("llava"), found.tokenizer, window=48)
    anatomy = dissect(found.model)

    def brighter(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**given, "pixel_values": 1 - given["pixel_values"]} if "pixel_values" in given else given

    handle = found.model.register_forward_pre_hook(brighter, with_kwargs=True)
    try:
        with pytest.raises(UnsupportedModelError, match="in another way than its body does"):
            record(found.model, anatomy, windows, torch.tensor([5]), torch.device("cpu"))
    finally:
        handle.remove()
