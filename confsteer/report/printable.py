"""Strings from anyone, for a terminal or a picture."""

from __future__ import annotations


def one_safe_line(text: str) -> str:
    """On one line and without control characters, which a terminal would obey and which may turn text around."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)
