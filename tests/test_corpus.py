from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from confsteer import CorpusError, SettingError
from confsteer.corpus import FIRST_POSITIONS, SHORTEST_WINDOW, make_windows, python_docs, read_counts, read_texts
from tests.models import VOCAB, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that starts every text with BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return tokenizer


DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=60), min_size=1, max_size=6)


@given(documents=DOCUMENTS, window=st.integers(SHORTEST_WINDOW, 40), batch=st.integers(1, 5))
def test_kept_positions_by_their_definition(documents: list[list[int]], window: int, batch: int) -> None:
    texts = [" ".join("<eos>" if i == 0 else f"t{i}" for i in ids) for ids in documents]
    expected = []
    for ids in documents:
        for first in range(0, len(ids), window):
            piece = ids[first : first + window]
            if len(piece) < SHORTEST_WINDOW:
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
        assert not any(len(ids) >= SHORTEST_WINDOW for ids in documents)
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
    assert windows.n_tokens > min(limit, 100) - SHORTEST_WINDOW


def test_reading_stops_when_there_are_enough_tokens() -> None:
    def endless() -> object:
        while True:
            yield "t1 " * 40

    assert make_windows(endless(), TOKENIZER, window=16, max_tokens=100).n_tokens <= 100  # type: ignore[arg-type]


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


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    good, empty, binary = tmp_path / "good.txt", tmp_path / "empty.txt", tmp_path / "binary.txt"
    good.write_text("t1 t2\n")
    empty.write_text(" \n")
    binary.write_bytes(b"t1 \xff\xfe")
    assert read_texts([good]) == ["t1 t2\n"]
    for bad, sentence in ((empty, "has no text"), (binary, "not UTF-8 text .byte 3"), (tmp_path / "none.txt", "No such file")):
        with pytest.raises(CorpusError, match=f"{bad.name}.*{sentence}"):
            read_texts([good, bad])


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


def test_the_demonstrations_text_has_two_disjoint_halves() -> None:
    def paragraphs(documents: list[str]) -> set[str]:
        return {p.strip() for document in documents for p in document.split("\n\n") if len(p) >= 60}

    calibration, held_out = python_docs("calibration"), python_docs("held-out")
    assert not paragraphs(calibration) & paragraphs(held_out)
    assert min(sum(map(len, calibration)), sum(map(len, held_out))) > 100_000
