from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from confsteer import CorpusError, SettingError
from confsteer.model.loading import DEMO
from confsteer.text.counts import read_counts
from confsteer.text.sources import python_docs
from confsteer.text.windows import (
    FIRST_POSITIONS,
    MIN_WINDOW,
    Windows,
    control_ids,
    leading_ids,
    make_windows,
    message_texts,
    prompt_ids,
    surrounding_ids,
)
from tests.models import CHAT_TEMPLATE, VOCAB, chat_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
STARTS_WITH_BOS = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
CONVERSATIONS = [
    [{"role": "user", "content": "t1 t2 t3"}, {"role": "assistant", "content": "t4 t5 t6 t7"}],
    [{"role": "user", "content": "t11 " * 10}, {"role": "assistant", "content": "t12 " * 20}],
]


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that starts every text with BOS, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = STARTS_WITH_BOS
    return tokenizer


def text_of(ids: list[int]) -> str:
    return " ".join("<eos>" if i == 0 else f"t{i}" for i in ids)


def cut(windows: Windows) -> list[list[int]]:
    return [windows.token_ids[first:last].tolist() for first, last in itertools.pairwise(windows.starts)]


DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=60), min_size=1, max_size=6)


@given(documents=DOCUMENTS, window=st.integers(MIN_WINDOW, 40), batch=st.integers(1, 5))
def test_kept_positions_by_their_definition(documents: list[list[int]], window: int, batch: int) -> None:
    texts = [text_of(ids) for ids in documents]
    expected = []
    for ids in documents:
        for first in range(0, len(ids), window):
            piece = ids[first : first + window]
            if len(piece) < MIN_WINDOW:
                continue
            for position, token in enumerate(piece):
                if position < FIRST_POSITIONS or position == len(piece) - 1:
                    continue
                if token == 0 or piece[position - 1] == 0:
                    continue
                expected.append((token, piece[position + 1]))
    try:
        windows = make_windows(texts, TOKENIZER, window=window)
    except CorpusError:
        assert not any(len(ids) >= MIN_WINDOW for ids in documents)
        return
    kept = [
        (int(token), int(target))
        for b in windows.batches(batch)
        for token, target in zip(b.input_ids[b.kept], b.targets, strict=True)
    ]
    assert kept == expected


def test_windows_start_with_bos_where_the_tokenizer_does_so() -> None:
    text = " ".join(f"t{i}" for i in range(1, 31))
    (batch,) = make_windows([text], with_bos(), window=16).batches(8)
    assert batch.input_ids[:, 0].tolist() == [0, 0]
    assert batch.input_ids[0, 1:].tolist() == list(range(1, 16))
    assert batch.input_ids[1, 1:].tolist() == list(range(16, 31))
    assert (make_windows([text], TOKENIZER, window=16).token_ids == np.arange(1, 31)).all()


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), window=st.integers(MIN_WINDOW, 40), bos=st.booleans())
def test_windows_never_cross_documents(lengths: list[int], window: int, bos: bool) -> None:
    """Document i is the word ``t{i}`` over and over; of each only a tail shorter than the shortest window is lost."""
    tokenizer = with_bos() if bos else TOKENIZER
    texts = [f"t{i} " * length for i, length in enumerate(lengths, start=1)]
    try:
        windows = cut(make_windows(texts, tokenizer, window=window))
    except CorpusError:
        windows = []
    kept = [0] * len(lengths)
    for ids in windows:
        words = ids[1:] if bos else ids
        assert len(set(words)) == 1
        kept[words[0] - 1] += len(words)
    for length, n in zip(lengths, kept, strict=True):
        assert length - MIN_WINDOW < n <= length


@given(documents=DOCUMENTS, window=st.integers(MIN_WINDOW, 40), bos=st.booleans())
def test_windows_that_cross_documents_are_the_stream_in_pieces(documents: list[list[int]], window: int, bos: bool) -> None:
    stream = documents[0] + [token for ids in documents[1:] for token in (TOKENIZER.eos_token_id, *ids)]
    try:
        windows = cut(
            make_windows(map(text_of, documents), with_bos() if bos else TOKENIZER, window=window, cross_documents=True)
        )
    except CorpusError:
        assert len(stream) < MIN_WINDOW
        return
    assert all(len(ids) == window for ids in windows[:-1])
    if bos:
        assert all(ids[0] == 0 for ids in windows)
    pieces = [token for ids in windows for token in (ids[1:] if bos else ids)]
    assert pieces == stream[: len(pieces)]
    assert len(stream) - len(pieces) < MIN_WINDOW


def test_the_joint_between_documents_does_not_count() -> None:
    windows = make_windows(["t1 t2 t3 t4 t5", "t6 t7 t8 t9 t10"], TOKENIZER, window=11, cross_documents=True)
    (batch,) = windows.batches(1)
    assert batch.input_ids[batch.kept].tolist() == [4, 5, 7, 8, 9]
    assert batch.targets.tolist() == [5, 0, 8, 9, 10]


def test_without_eos_documents_are_not_joined() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(SettingError, match="no EOS token"):
        make_windows(["t1 " * 30], tokenizer, cross_documents=True)


@pytest.mark.parametrize("characters", [2, 100, 333, 5000])
def test_a_long_text_is_tokenized_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = max(python_docs("calibration"), key=len)[:20_000]
    whole = tokenizer(text, verbose=False)["input_ids"]
    monkeypatch.setattr("confsteer.text.windows.PART_CHARACTERS", characters)
    in_parts = make_windows([text], tokenizer, window=len(whole)).token_ids
    if characters >= 100:  # longer than the words
        assert in_parts.tolist() == whole
    assert tokenizer.decode(in_parts) == text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.removeprefix("{{ bos_token }} ")])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_conversations_are_the_ids_of_the_chat_template(template: str, adds_bos: bool) -> None:
    tokenizer = chat_tokenizer(template)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = STARTS_WITH_BOS
    served: Any = [tokenizer.apply_chat_template(c, tokenize=True, return_dict=False) for c in CONVERSATIONS]
    assert [ids[0] for ids in served] == [0 if template == CHAT_TEMPLATE else 94] * len(served)
    assert cut(make_windows(CONVERSATIONS, tokenizer)) == served
    # A window that continues a conversation starts with BOS if the conversation does.
    first, second = cut(make_windows(CONVERSATIONS[1:], tokenizer, window=12))[:2]
    start = [0] if template == CHAT_TEMPLATE else []
    assert first == served[1][:12]
    assert second == start + served[1][12 : 24 - len(start)]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.removeprefix("{{ bos_token }} ")])
def test_a_prompt_is_a_users_turn_where_there_is_a_template(template: str) -> None:
    tokenizer: Any = chat_tokenizer(template + "{% if add_generation_prompt %}<|start|> assistant{% endif %}")
    start = [0] if template == CHAT_TEMPLATE else []
    assert prompt_ids("t3 t5", tokenizer) == [*start, 94, 92, 3, 5, 95, 94, 93]
    tokenizer.add_bos_token = True
    assert prompt_ids("t3 t5", tokenizer) == [*start, 94, 92, 3, 5, 95, 94, 93], "the template writes them all"
    assert prompt_ids("t3 t5", tokenizer, chat=False) == tokenizer("t3 t5").input_ids
    assert prompt_ids("t3 t5", tiny_tokenizer()) == [3, 5]
    with pytest.raises(CorpusError, match="no chat template"):
        prompt_ids("t3 t5", tiny_tokenizer(), chat=True)


def test_role_markers_and_roles_do_not_count() -> None:
    tokenizer = chat_tokenizer()
    windows = make_windows(CONVERSATIONS, tokenizer)
    assert windows.special_ids == (0, 94, 95)
    (batch,) = windows.batches(8)
    counted, targets = batch.input_ids[batch.kept].tolist(), batch.targets.tolist()
    assert not {0, 92, 93, 94, 95} & set(counted)
    assert 95 in targets, "that a turn ends is something the model decides"
    assert windows.counts(VOCAB)[[0, 94, 95]].tolist() == [0, 0, 0]


def test_the_unknown_token_counts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "t9", "pad_token": "t8"})
    assert control_ids(tokenizer) == (0, 8)


def test_a_chat_template_is_needed_and_may_refuse() -> None:
    with pytest.raises(CorpusError, match="no chat template"):
        make_windows(CONVERSATIONS, TOKENIZER)
    refusing = chat_tokenizer("{% if messages[0].role != 'user' %}{{ raise_exception('first comes the user') }}{% endif %}t1")
    with pytest.raises(CorpusError, match="refuses conversation 2: first comes the user"):
        make_windows([CONVERSATIONS[0], CONVERSATIONS[0][1:]], refusing)
    with pytest.raises(SettingError, match="cannot cross"):
        make_windows(CONVERSATIONS, chat_tokenizer(), cross_documents=True)


def test_counts_leave_special_tokens_out() -> None:
    windows = make_windows(["<eos> " + "t5 " * 10 + "t7"], TOKENIZER, window=12)
    counts = windows.counts(VOCAB)
    assert counts[0] == 0
    assert counts[5] == 10
    assert counts[7] == 1
    assert len(counts) == VOCAB


@pytest.mark.parametrize("limit", [8, 20, 33, 1000])
def test_no_more_tokens_than_asked(limit: int) -> None:
    windows = make_windows(["t1 " * 25] * 4, TOKENIZER, window=16, max_tokens=limit)
    assert windows.n_tokens <= limit
    assert windows.n_tokens > min(limit, 100) - MIN_WINDOW


def test_reading_stops_when_there_are_enough_tokens() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "t1 " * 40

    assert make_windows(endless(), TOKENIZER, window=16, max_tokens=100).n_tokens <= 100
    assert read == 3
    assert make_windows(endless(), TOKENIZER, window=16, max_tokens=100, cross_documents=True).n_tokens <= 100
    assert read == 6


def test_the_hash_is_of_the_text_and_of_where_windows_start() -> None:
    texts = ["t1 " * 30, "t2 " * 30]
    same = make_windows(texts, TOKENIZER, window=16, source="another name")
    assert make_windows(texts, TOKENIZER, window=16).sha256 == same.sha256
    assert make_windows(texts, TOKENIZER, window=15).sha256 != same.sha256
    assert make_windows(texts[::-1], TOKENIZER, window=16).sha256 != same.sha256


@pytest.mark.parametrize("texts", [[], [""], ["t1 t2"], ["t1 " * 7] * 50])
def test_too_little_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(CorpusError, match="too short"):
        make_windows(texts, TOKENIZER)


def test_a_tiny_window_is_refused() -> None:
    with pytest.raises(SettingError, match="window of 4 tokens is too short; use at least 8"):
        make_windows(["t1 " * 30], TOKENIZER, window=4)
    with pytest.raises(SettingError, match="5 tokens make no window; read at least 8"):
        make_windows(["t1 " * 30], TOKENIZER, max_tokens=5)


def test_counts_are_read_and_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.arange(5))
    assert read_counts(tmp_path / "c.npy").tolist() == [0, 1, 2, 3, 4]
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.arange(3))
    (tmp_path / "text.npy").write_text("no array")
    for name, sentence in (
        ("pickle.npy", "not a .npy file"),
        ("several.npz", "several arrays"),
        ("text.npy", "not a .npy file"),
        ("none.npy", "No such file"),
    ):
        with pytest.raises(CorpusError, match=sentence):
            read_counts(tmp_path / name)


def with_frame(single: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its own tokens around a text; ``<eos>`` is the unknown word as well, ``t90`` a word."""
    tokenizer = tiny_tokenizer()
    tokens = [(token, TOKENIZER.convert_tokens_to_ids(token)) for token in ("<eos>", "t90", "t91")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [
        ("$A", [], []),
        ("<eos> $A", [0], []),
        ("t90 t91 $A", [90, 91], []),
        ("$A <eos>", [], [0]),
        ("<eos> t90 $A t90 <eos>", [0, 90], [90, 0]),
        ("<eos> <eos> $A <eos>", [0, 0], [0]),
    ],
)
def test_windows_start_with_what_the_tokenizer_puts_in_front(single: str, before: list[int], after: list[int]) -> None:
    tokenizer = with_frame(single)
    assert surrounding_ids(tokenizer) == (before, after)
    assert leading_ids(tokenizer) == before
    words = [i % 80 + 1 for i in range(40)]
    found = cut(make_windows([text_of(words)], tokenizer, window=16))
    assert [ids[: len(before)] for ids in found] == [before] * len(found)
    assert [token for ids in found for token in ids[len(before) :]] == words[: sum(len(ids) - len(before) for ids in found)]
    assert tokenizer(text_of(words[:10]))["input_ids"] == [*before, *words[:10], *after]


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused() -> None:
    def tokenize(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 3] if add_special_tokens else [4, 3]}

    tokenizer: Any = tokenize
    with pytest.raises(CorpusError, match="not to be told"):
        surrounding_ids(tokenizer)


def test_a_conversation_that_starts_as_texts_do_goes_on_so() -> None:
    tokenizer = chat_tokenizer("<|start|> <|end|> {% for message in messages %}{{ message.content }} {% endfor %}")
    frame = TemplateProcessing(single="<|start|> <|end|> $A", special_tokens=[("<|start|>", 94), ("<|end|>", 95)])
    tokenizer.backend_tokenizer.post_processor = frame
    found = cut(make_windows([[{"role": "user", "content": "t7 " * 30}]], tokenizer, window=12))
    assert [ids[:3] for ids in found] == [[94, 95, 7]] * 3
    assert sum(ids.count(7) for ids in found) == 30


def test_a_window_has_room_for_text() -> None:
    tokenizer = with_frame(" ".join(["t90"] * 12) + " $A")
    with pytest.raises(SettingError, match="no room for text after the 12 that start every text"):
        make_windows(["t1 " * 30], tokenizer, window=12)


PARTS = [{"type": "text", "text": "t5 t6 "}, {"type": "text", "text": "t7 t8"}]
PRINTING = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
TEMPLATES = {
    "prints": PRINTING,
    "trims": PRINTING.replace("m.content", "m['content'] | trim"),
    "adds": PRINTING.replace("m.content", "'' + m.content"),
    "knows parts": "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}"
    "{% for part in m.content or [] %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}",
    "knows parts alone": "{% for m in messages %}{{ m.role }} "
    "{% for part in m.content %}{{ part.text }} {% endfor %}{% endfor %}",
    "asks for null": "{% for m in messages %}{{ m.role }} {% if m.content is not none %}{{ m.content }}{% endif %} {% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("content", ["t5 t6 t7 t8", PARTS, ["t5 t6 ", *PARTS[1:]], None, []], ids=str)
def test_content_is_text_whatever_form_a_template_takes(template: str, content: Any) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[template])
    turns = [{"role": "user", "content": "t1 t2 t3 t4 t9"}, {"role": "assistant", "content": content}, CONVERSATIONS[0][0]]
    (found,) = cut(make_windows([turns], tokenizer))
    assert found == [92, 1, 2, 3, 4, 9, 93, *([5, 6, 7, 8] if content else []), 92, 1, 2, 3]


def test_what_a_template_makes_of_null_and_strings_on_purpose_stays() -> None:
    calls = chat_tokenizer("{% for m in messages %}{{ 't80 ' * 8 if m.content is none else m.content }} {% endfor %}")
    assert cut(make_windows([[{"role": "assistant", "content": None}]], calls)) == [[80] * 8]
    # Thoughts are left out of a string, and would not be of parts.
    thinking = chat_tokenizer(
        "{% for m in messages %}{% if m.content is string %}{{ m.content.split('t66')[-1] }} {% else %}"
        "{% for part in m.content %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}"
    )
    assert cut(make_windows([[{"role": "assistant", "content": "t1 t66 " + "t2 " * 9}]], thinking)) == [[2] * 9]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "message 2 has a part that is no text (type 'image_url')"),
        ([*PARTS, 3], "message 2 has a part that is no text (a number)"),
        ([{"type": "text", "text": None}], "message 2 has a part that is no text (type 'text')"),
        ([{"text": "t1"}], "message 2 has a part that is no text (type None)"),
        ({"type": "text", "text": "t1"}, "the content of message 2 is an object"),
        (0, "the content of message 2 is a number"),
        (False, "the content of message 2 is a truth value"),
    ],
)
def test_content_that_is_no_text_is_refused(content: Any, sentence: str) -> None:
    turns = [*CONVERSATIONS[0][:1], {"role": "assistant", "content": content}]
    with pytest.raises(CorpusError) as error:
        make_windows([CONVERSATIONS[0], turns], chat_tokenizer())
    assert f"conversation 2: {sentence}" in str(error.value)


def test_a_message_may_have_no_content() -> None:
    assert message_texts([{"role": "assistant", "tool_calls": []}, {"role": "user", "content": None}], "here") == [None, ""]


def test_a_text_of_control_tokens_says_so() -> None:
    windows = make_windows(["<eos> " * 40], TOKENIZER, source="ends")
    with pytest.raises(CorpusError, match=r"ends: no token counts: .*only control tokens"):
        windows.check_counted()
    make_windows(["<eos> " * 40, "t1 " * 8], TOKENIZER).check_counted()
