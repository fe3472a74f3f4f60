from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from confsteer import demo
from confsteer.text.spelling import Spelling

WORDS = "the end is near, and nearer still: naïve café </end>"
TEXTS = st.text() | st.lists(st.sampled_from([*WORDS.split(" "), "\n\n", " .", "答案", "😀", "\u2028", "\ufffd"])).map(" ".join)


def sentence_piece() -> PreTrainedTokenizerFast:
    """A vocabulary of pieces in which a space is a letter, and characters that it lacks are bytes, as in Llama 2 and Gemma."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator([WORDS] * 9, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *bytes_]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([WORDS] * 9, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</end>"])
    # Decoding cleans up spaces unless it is told not to.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


MADE: dict[str, Any] = {"demo": lambda: demo.load().tokenizer, "byte level": byte_level, "sentence pieces": sentence_piece}


@functools.cache
def spelling(name: str) -> Spelling:
    return Spelling(MADE[name]())


@pytest.mark.parametrize("name", MADE)
@given(text=TEXTS)
def test_the_tokens_of_a_text_spell_it_byte_by_byte(name: str, text: str) -> None:
    spelled = b"".join(map(spelling(name).bytes_of, spelling(name).encode(text)))
    # SentencePiece begins every text with a space of its own.
    assert spelled == text.encode() or (name == "sentence pieces" and spelled == f" {text}".encode())


def test_a_place_without_a_token_spells_nothing_that_is_looked_for() -> None:
    assert spelling("demo").bytes_of(-1).decode(errors="ignore") == ""
