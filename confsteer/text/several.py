"""Several texts by name, each cut into windows of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from transformers import PreTrainedTokenizerBase

from confsteer.errors import CorpusError
from confsteer.text.windows import Documents, Windows, make_windows

Texts = Documents | Windows | Mapping[str, Documents | Windows]
"""One text, as `confsteer.text.windows.make_windows` takes it, or several by name."""


def named_windows(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, *, tokens: int | None, window: int, source: str
) -> Iterator[tuple[str, Windows]]:
    """Cut each text into windows, in whatever form the texts are given. Ready-made windows have a name of their own.

    Args:
        texts: see `Texts`.
        tokenizer: the model's tokenizer.
        tokens: most tokens to read of each text; all if None. Ready-made windows stay as they are.
        window: tokens per window.
        source: name of a text that has none.

    Yields:
        The name of a text and its windows. They are made one text at a time, so that only one is in memory.

    Raises:
        CorpusError: a text is too short.
        SettingError: the window is too short.
    """
    by_name = texts if isinstance(texts, Mapping) else {texts.source if isinstance(texts, Windows) else source: texts}
    for name, documents in by_name.items():
        yield name, make_windows(documents, tokenizer, window=window, max_tokens=tokens, source=name)


def join_windows(by_name: Mapping[str, Windows]) -> Windows:
    """Put the windows of several texts after each other. No batch has windows of two texts.

    Args:
        by_name: windows by the name of their text, all of the same tokenizer.

    Raises:
        CorpusError: there is no text, no token counts in one of them, or their tokenizers differ.
    """
    if not by_name:
        raise CorpusError("there is no text: give one, or several by name")
    for windows in by_name.values():
        windows.check_counted()
    first, *others = by_name.values()
    if not others:
        return first
    if any(windows.special_ids != first.special_ids for windows in others):
        raise CorpusError("the texts are windows of different tokenizers: cut them with the model's own")
    texts = list(by_name.values())
    tokens = np.cumsum([0, *(text.n_tokens for text in texts)])
    documents = np.cumsum([0, *(int(text.document.max()) + 1 for text in texts)])
    first_windows = np.cumsum([0, *map(len, texts[:-1])]).tolist()
    return dataclasses.replace(
        first,
        token_ids=np.concatenate([text.token_ids for text in texts]),
        starts=np.concatenate([[0], *(text.starts[1:] + start for text, start in zip(texts, tokens, strict=False))]),
        window=max(text.window for text in texts),
        source=" + ".join(by_name),
        document=np.concatenate([text.document + start for text, start in zip(texts, documents, strict=False)]),
        text_starts=tuple(first_windows),
        inputs={i + start: given for text, start in zip(texts, first_windows, strict=True) for i, given in text.inputs.items()},
        placeholder_ids=frozenset().union(*(text.placeholder_ids for text in texts)),
    )
