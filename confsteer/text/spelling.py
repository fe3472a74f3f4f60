"""The text that each token adds to others, byte by byte."""

from __future__ import annotations

import functools
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

UNREADABLE = b"\xff"
"""A byte that is in no UTF-8 text, and so in no text that is searched for."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""Pattern of a token of one byte, in the vocabularies of SentencePiece."""


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Map the letters of byte-level vocabularies to bytes. They are GPT-2's, which the others have taken over."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


class Spelling:
    """The text of each token of a tokenizer, as in the middle of a text.

    Args:
        tokenizer: a transformers tokenizer, or one that encodes, decodes and names tokens in the same way.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decode = tokenizer.decode
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            decode = functools.partial(decode, clean_up_tokenization_spaces=False)
        self._decode = decode
        # Put a text before the token: some tokenizers leave out a text's first space.
        self._before = self.encode("a")[-1:]
        self._written = len(decode(self._before))
        self.text_of = functools.cache(self._text_of)
        self.bytes_of = functools.cache(self._bytes_of)

    def encode(self, text: str) -> list[int]:
        """Encode a text to token ids, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _text_of(self, token: int) -> str:
        return str(self._decode([*self._before, token]))[self._written :]

    def _bytes_of(self, token: int) -> bytes:
        if token < 0:
            return UNREADABLE  # a place that holds no token
        text = self.text_of(token)
        if "\ufffd" not in text:
            return text.encode()
        # Read the vocabulary: the token is a part of a character, and only the vocabulary says which.
        (piece,) = self._tokenizer.convert_ids_to_tokens([token])
        if byte := BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        alphabet = _byte_alphabet()
        return bytes(alphabet[letter] for letter in piece) if set(piece) <= alphabet.keys() else UNREADABLE
