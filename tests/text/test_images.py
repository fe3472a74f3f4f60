"""Conversations with images: what a processor makes of them, which positions count, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from confsteer import CorpusError, SettingError, read_texts
from confsteer.text.images import with_images
from confsteer.text.several import join_windows
from confsteer.text.windows import FIRST_POSITIONS, SeenConversation, make_windows
from tests.models import IMAGE, IMAGE_TOKENS, tiny_processor, tiny_tokenizer

Image = pytest.importorskip("PIL.Image", reason="images need Pillow")

SEEING = pytest.mark.parametrize("model_type", ["gemma3", "llava"])
TEXT = {"type": "text", "text": "t1 t2 t3 t4"}


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def turns(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "t5", "content": [*parts]}, {"role": "t6", "content": "t7 t8 t9 t10 t11"}]


@SEEING
def test_the_model_is_given_what_the_processor_gives(model_type: str, tmp_path: Path) -> None:
    processor = tiny_processor(model_type)
    files = [picture(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    plain = [{"role": "t5", "content": "t6 " * 9}]
    chat = turns({"type": "image", "path": str(files[0])}, TEXT, {"type": "image", "url": str(files[1])})
    same = turns({"type": "image", "image": Image.open(files[0])}, TEXT, {"type": "image", "image": str(files[1])})
    first, seen, again = with_images([plain, chat, same], processor)
    assert first is plain
    assert isinstance(seen, SeenConversation)
    assert isinstance(again, SeenConversation)
    word = "t94" if model_type == "gemma3" else f"t{IMAGE}"
    text = f"t5 {word} t1 t2 t3 t4 {word} t6 t7 t8 t9 t10 t11"
    images = [Image.open(file).convert("RGB") for file in files]
    expected = processor(images=[images], text=[text], return_tensors="pt")
    for one in (seen, again):
        assert one.token_ids == expected["input_ids"][0].tolist()
        assert one.inputs.keys() == expected.keys() - {"input_ids", "attention_mask"}
        for name, value in one.inputs.items():
            assert torch.equal(value, expected[name])
    assert seen.token_ids.count(IMAGE) == 2 * IMAGE_TOKENS
    assert chat[0]["content"][0] == {"type": "image", "path": str(files[0])}, "what was given is left as it was"


def test_images_do_not_count_and_such_windows_are_batches_by_themselves(tmp_path: Path) -> None:
    processor = tiny_processor("llava")
    part = {"type": "image", "path": str(picture(tmp_path / "a.png"))}
    chats = [turns(TEXT, part, TEXT), turns(part, TEXT)]
    text = "t20 " * 30
    windows = make_windows(with_images([text, chats[0], text, text, text, chats[1]], processor), tiny_tokenizer(), window=32)
    assert IMAGE not in windows.special_ids
    batches = list(windows.batches(2))
    assert [len(batch.input_ids) for batch in batches] == [1, 1, 2, 1, 1]
    assert [bool(batch.inputs) for batch in batches] == [False, True, False, False, True]
    counted = 0
    for batch in batches:
        for row, kept in zip(batch.input_ids.tolist(), batch.kept.tolist(), strict=True):
            for position, token in enumerate(row[:-1]):
                after = row[position + 1]
                expected = position >= FIRST_POSITIONS and IMAGE not in (token, after)
                assert kept[position] == expected
                counted += expected
        assert IMAGE not in batch.targets
    assert counted > 4 * 26
    counts = windows.counts(96)
    assert counts[IMAGE] == 0
    assert int(counts.sum()) == windows.n_tokens - 2 * IMAGE_TOKENS
    joined = join_windows({"text": make_windows([text] * 3, tiny_tokenizer(), window=32), "chats": windows})
    assert [(batch.text, bool(batch.inputs)) for batch in joined.batches(4) if batch.text or batch.inputs] == [
        (1, False),
        (1, True),
        (1, False),
        (1, True),
    ]
    assert joined.placeholder_ids == {IMAGE}


def test_other_pixels_are_another_text(tmp_path: Path) -> None:
    processor = tiny_processor("llava")
    one, same, other = (
        make_windows(
            with_images([turns({"type": "image", "path": str(picture(tmp_path / "a.png", seed=seed))})], processor),
            tiny_tokenizer(),
        )
        for seed in (0, 0, 1)
    )
    assert one.sha256 == same.sha256 != other.sha256
    assert (one.token_ids == other.token_ids).all()


def test_a_conversation_with_images_is_whole_or_not_there(tmp_path: Path) -> None:
    processor, tokenizer = tiny_processor("llava"), tiny_tokenizer()
    chat = turns({"type": "image", "path": str(picture(tmp_path / "a.png"))}, TEXT)
    (seen,) = with_images([chat], processor)
    assert isinstance(seen, SeenConversation)
    tokens = len(seen.token_ids)
    assert len(make_windows([seen, seen], tokenizer, window=tokens)) == 2
    with pytest.raises(CorpusError, match=f"conversation 1 has {tokens} tokens with its images.*at least {tokens} "):
        make_windows([seen], tokenizer, window=tokens - 1)
    assert len(make_windows([seen, seen, "t1 " * 40], tokenizer, window=tokens, max_tokens=2 * tokens - 1)) == 1
    with pytest.raises(CorpusError, match=f"cannot be cut: read more than {tokens - 1}"):
        make_windows([seen], tokenizer, window=tokens, max_tokens=tokens - 1)
    with pytest.raises(SettingError, match="one by one"):
        make_windows([seen], tokenizer, cross_documents=True)


def test_images_of_a_record_go_to_the_parts_without_a_file(tmp_path: Path) -> None:
    files = [str(picture(tmp_path / f"{i}.png", seed=i)) for i in range(3)]
    record: dict[str, Any] = {
        "messages": turns({"type": "image"}, {"type": "image", "path": files[2]}, {"type": "image"}),
        "images": files[:2],
    }
    (tmp_path / "chats.jsonl").write_text(json.dumps(record))
    (placed,) = read_texts(tmp_path / "chats.jsonl", chat=True)
    (named,) = with_images([turns(*({"type": "image", "path": files[i]} for i in (0, 2, 1)))], tiny_processor("llava"))
    (seen,) = with_images([placed], tiny_processor("llava"))
    assert isinstance(seen, SeenConversation)
    assert isinstance(named, SeenConversation)
    assert torch.equal(seen.inputs["pixel_values"], named.inputs["pixel_values"])
    for images, sentence in ((files, "2 parts for an image without a file, the record has 3"), (files[:1], "has 1")):
        (tmp_path / "chats.jsonl").write_text(json.dumps(record | {"images": images}))
        with pytest.raises(CorpusError, match=f"line 1, field 'messages': .*{sentence}"):
            list(read_texts(tmp_path / "chats.jsonl", chat=True))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"type": "image"}, "conversation 1, image 1 has no file"),
        ({"type": "image", "path": 3}, "conversation 1, image 1 has no file"),
        ({"type": "image", "url": "https://example.org/a.png"}, "nothing is fetched: save it"),
        ({"type": "image", "url": "data:image/png;base64,AAAA"}, "nothing is fetched: save it"),
        ({"type": "image", "path": "nowhere.png"}, "cannot read nowhere.png: No such file"),
        ({"type": "image", "path": "."}, "cannot read .: "),
        ({"type": "image", "path": __file__}, "is not an image that Pillow reads"),
        ({"type": "video", "path": "a.mp4"}, "message 1 has a part that is no text (type 'video')"),
        ({"type": "text", "text": f"t1 t{IMAGE}"}, "has 1 images, and the chat template of LlavaProcessor makes place for 2"),
    ],
)
def test_what_is_no_image_is_refused(part: Any, sentence: str, tmp_path: Path) -> None:
    good = {"type": "image", "path": str(picture(tmp_path / "a.png"))}
    with pytest.raises(CorpusError) as error:
        list(with_images([turns(part, good)], tiny_processor("llava")))
    assert sentence in str(error.value)


def test_large_files_and_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = turns({"type": "image", "path": str(picture(tmp_path / "a.png"))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(CorpusError, match=r"not an image that Pillow reads.*exceeds limit"):
        list(with_images([chat], tiny_processor("llava")))
    monkeypatch.setattr("confsteer.text.images.MAX_IMAGE_BYTES", 100)
    with pytest.raises(CorpusError, match="more than 100 bytes"):
        list(with_images([chat], tiny_processor("llava")))


@pytest.mark.parametrize("reply", ["{{ m.content + ' t12' }}", "{% if m.content is string %}{{ m.content }} t12{% endif %}"])
def test_a_template_may_take_strings_where_there_is_no_image(reply: str, tmp_path: Path) -> None:
    """It fails at parts there, or leaves them out."""
    processor = tiny_processor("llava")
    processor.chat_template = f"t5 t{IMAGE} {{% set m = messages[1] %}}{reply}"
    (seen,) = with_images([turns({"type": "image", "path": str(picture(tmp_path / "a.png"))})], processor)
    assert isinstance(seen, SeenConversation)
    assert seen.token_ids == [5, *[IMAGE] * IMAGE_TOKENS, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{% for m in messages %}{{ m.role }} {{ m.content[-1].text }} {% endfor %}",
            "has 1 images, .* makes place for 0: it does not know images",
        ),
        ("{{ messages[0].role }} t95", "leaves out text of message 1"),
        ("{{ raise_exception('roles must alternate') }}", "refuses conversation 1: roles must alternate"),
        (None, "refuses conversation 1: .*does not have a chat template"),
    ],
)
def test_templates_that_lose_something_are_refused(template: str | None, sentence: str, tmp_path: Path) -> None:
    processor = tiny_processor("llava")
    processor.chat_template = template
    chat = turns({"type": "image", "path": str(picture(tmp_path / "a.png"))}, TEXT)
    with pytest.raises(CorpusError, match=sentence):
        list(with_images([chat], processor))


def test_without_a_processor_images_are_refused(tmp_path: Path) -> None:
    chat = turns({"type": "image", "path": "a.png"}, TEXT)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].role }}"
    with pytest.raises(CorpusError, match=r"part that is no text .type 'image'., and only text is read here"):
        make_windows([chat], tokenizer)
