from __future__ import annotations

from collections import Counter
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

import confsteer
from confsteer import CorpusError
from confsteer.text import windows
from confsteer.text.windows import make_windows, token_ids_in_parts
from tests.models import VOCAB, chat_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
words = st.lists(st.integers(1, VOCAB - 1), max_size=30)


@given(st.lists(words, min_size=1, max_size=8), st.integers(5, 40), st.integers(1, 4))
def test_each_token_is_counted_once_however_the_corpus_is_cut(documents: list[list[int]], characters: int, parts: int) -> None:
    expected = Counter(i for document in documents for i in document)
    texts = [" ".join(f"t{i}" for i in document) for document in documents]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows, "PART_CHARACTERS", characters)
        patched.setattr(windows, "MAX_PARTS", parts)
        if not expected:
            with pytest.raises(CorpusError, match="nothing to count"):
                confsteer.count_tokens(texts, TOKENIZER)
            return
        counts = confsteer.count_tokens(texts, TOKENIZER)
    assert counts.shape == (VOCAB,)
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == expected


def test_counts_are_those_of_the_windows_of_the_same_text() -> None:
    texts = [" ".join(f"t{1 + (i * i + start) % 90}" for i in range(32)) for start in range(5)]
    assert confsteer.count_tokens(texts, TOKENIZER).tolist() == make_windows(texts, TOKENIZER, window=8).counts(VOCAB).tolist()
    tokenizer = chat_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in texts]
    counts = confsteer.count_tokens(chats, tokenizer).tolist()
    assert counts == make_windows(chats, tokenizer, window=64).counts(VOCAB).tolist()
    assert counts[92] == len(chats), "the template's word for the user"
    assert counts[0] == counts[94] == counts[95] == 0, "control tokens"


def test_a_corpus_is_not_kept() -> None:
    assert len(next(token_ids_in_parts(repeat("t1 t2"), TOKENIZER))) == windows.MAX_PARTS
