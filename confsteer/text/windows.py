"""Documents to token windows, and which positions of a window count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from confsteer.defaults import SOURCE, WINDOW
from confsteer.errors import CorpusError, SettingError

FIRST_POSITIONS = 3
"""Positions at the start of a window that are left out: with so little context they are unlike the rest."""
MIN_WINDOW = 8
MIN_DOCUMENTS = 20
"""That can be resampled, or shared out over splits; of a text that has fewer it is windows."""
PART_CHARACTERS = 1_000_000
"""A longer text is tokenized in parts: a tokenizer needs about a hundred bytes per token of what it is given at once."""


Conversation = Sequence[Mapping[str, Any]]
"""Messages with ``role`` and ``content``, as a chat template takes them."""
Document = str | Conversation


@dataclass(frozen=True)
class WindowBatch:
    """A few windows, padded on the right to the longest."""

    input_ids: Tensor
    """``[windows, length]``"""
    attention_mask: Tensor
    """``[windows, length]``, 0 on padding."""
    kept: Tensor
    """Positions that count, ``[windows, length]`` bool; the next token is inside the window at each."""

    @property
    def targets(self) -> Tensor:
        """The token that follows each kept position, ``[kept tokens]``."""
        return self.input_ids.roll(-1, dims=1)[self.kept]

    @property
    def window(self) -> Tensor:
        """Index within the batch of the window each kept position is in, ``[kept tokens]``."""
        return self.kept.nonzero()[:, 0]


@dataclass(frozen=True)
class Windows:
    """A corpus as token windows. The ids are held in memory, four bytes per token; what is computed from them is streamed."""

    token_ids: NDArray[np.int32]
    """All windows one after the other, ``[tokens]``."""
    starts: NDArray[np.int64]
    """Where each window starts in `token_ids`, and the end of the last, ``[windows + 1]``."""
    special_ids: tuple[int, ...]
    """Control tokens, which do not count, nor does the token after each: see `control_ids`."""
    window: int
    """Tokens in the longest window there may be."""
    source: str
    """What the text was, for the profile."""
    document: NDArray[np.int64]
    """Which document each window is of, ``[windows]``; windows that cross documents are all of one."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def sha256(self) -> str:
        """Hash of the token ids and of where the windows start."""
        digest = hashlib.sha256(self.token_ids.astype("<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def blocks(self) -> tuple[NDArray[np.int64], Literal["documents", "windows"]]:
        """What of the text is unlike the rest, by window ``[windows]``, and what that is.

        Documents, if there are `MIN_DOCUMENTS`; windows of a text that has fewer.
        """
        if len(np.unique(self.document)) >= MIN_DOCUMENTS:
            return self.document, "documents"
        return np.arange(len(self)), "windows"

    def counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs, control tokens not counted, ``[vocab_size]`` int64."""
        counts = np.bincount(self.token_ids, minlength=vocab_size)
        counts[[i for i in self.special_ids if i < len(counts)]] = 0
        return torch.from_numpy(counts)

    def batches(self, batch_size: int) -> Iterator[WindowBatch]:
        """The windows in order, `batch_size` at a time."""
        for first in range(0, len(self), batch_size):
            last = min(first + batch_size, len(self))
            windows = [self.token_ids[self.starts[i] : self.starts[i + 1]] for i in range(first, last)]
            length = max(map(len, windows))
            input_ids = np.zeros((len(windows), length), dtype=np.int64)
            attention_mask = np.zeros_like(input_ids)
            for row, window in enumerate(windows):
                input_ids[row, : len(window)] = window
                attention_mask[row, : len(window)] = 1
            yield WindowBatch(
                torch.from_numpy(input_ids),
                torch.from_numpy(attention_mask),
                torch.from_numpy(self._kept(input_ids, attention_mask)),
            )

    def _kept(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Without the first positions, the last of each window, control tokens and the token after these."""
        kept = attention_mask.astype(bool)
        kept[:, :-1] &= attention_mask[:, 1:].astype(bool)
        kept[:, -1] = False
        kept[:, :FIRST_POSITIONS] = False
        special = np.isin(input_ids, self.special_ids)
        kept &= ~special
        kept[:, 1:] &= ~special[:, :-1]
        return kept


class TokenizedDocument(NamedTuple):
    """A document as `cut_windows` takes it."""

    start: Sequence[int]
    """What each of its windows begins with: BOS, or nothing."""
    token_ids: Iterable[int]
    """The rest; it is read no further than needed."""


def make_windows(
    documents: Iterable[Document] | Windows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = WINDOW,
    max_tokens: int | None = None,
    cross_documents: bool = False,
    source: str = SOURCE,
) -> Windows:
    """Tokenize documents into windows.

    Every window of a text starts with BOS if the tokenizer starts texts with it. A conversation becomes what the model is
    served: the ids of the tokenizer's chat template, nothing added; if they start with BOS, so do the windows that continue
    it. All turns count, the user's as well: few templates tell which tokens are the assistant's. What templates put around
    turns does not count where it is a control token (see `control_ids`).

    Args:
        documents: strings, or conversations; or windows already made, which are returned as they are.
        tokenizer: the model's.
        window: tokens per window, BOS included.
        max_tokens: stop here, and read no more documents than that takes; all if None.
        cross_documents: cut texts as pre-training does, joined with EOS between them, so that all windows but the last are
            full.
        source: a description of the text for the profile.

    Raises:
        SettingError: `window` or `max_tokens` is too small; or `cross_documents` with conversations, or without an EOS token.
        CorpusError: there are not enough tokens for one window; or there is no chat template, or it refuses a conversation.
    """
    if isinstance(documents, Windows):
        return documents
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = leading_ids(tokenizer)

    def tokenized() -> Iterator[TokenizedDocument]:
        for number, document in enumerate(documents, start=1):
            if isinstance(document, str):
                yield TokenizedDocument(start, _token_ids(document, tokenizer))
            elif cross_documents:
                raise SettingError("conversations are served one by one: windows of them cannot cross documents")
            else:
                ids = _token_ids(_apply_chat_template(document, tokenizer, number), tokenizer)
                first = list(islice(ids, 1))
                yield TokenizedDocument(first, ids) if first == [bos] else TokenizedDocument([], chain(first, ids))

    def joined() -> Iterator[int]:
        for number, document in enumerate(tokenized()):
            if number:
                yield eos
            yield from document.token_ids

    if cross_documents and eos is None:
        raise SettingError("the tokenizer has no EOS token to put between documents: windows cannot cross them")
    return cut_windows(
        [TokenizedDocument(start, joined())] if cross_documents else tokenized(),
        tokenizer,
        window=window,
        max_tokens=max_tokens,
        source=source,
    )


def cut_windows(
    documents: Iterable[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    max_tokens: int | None = None,
    source: str,
) -> Windows:
    """Windows of token ids. A document's last, shorter window is kept if it has `MIN_WINDOW` tokens.

    Args:
        documents: see `TokenizedDocument`.
        tokenizer: what the ids are of.
        window: tokens per window, the document's start included.
        max_tokens: stop here; the whole text if None.
        source: a description of the text for the profile.

    Raises:
        SettingError: `window` or `max_tokens` is too small.
        CorpusError: there are not enough tokens for one window.
    """
    if window < MIN_WINDOW:
        raise SettingError(f"a window of {window} tokens is too short; use at least {MIN_WINDOW}")
    if max_tokens is not None and max_tokens < MIN_WINDOW:
        raise SettingError(f"{max_tokens} tokens make no window; read at least {MIN_WINDOW}")
    pieces: list[NDArray[np.int32]] = []
    document: list[int] = []
    total = 0
    for number, (start, token_ids) in enumerate(documents):
        ids = iter(token_ids)
        while (max_tokens is None or total + MIN_WINDOW <= max_tokens) and (body := [*islice(ids, window - len(start))]):
            piece = [*start, *body]
            if max_tokens is not None:
                piece = piece[: max_tokens - total]
            if len(piece) >= MIN_WINDOW:
                pieces.append(np.asarray(piece, dtype=np.int32))
                document.append(number)
                total += len(piece)
        if max_tokens is not None and total + MIN_WINDOW > max_tokens:
            break
    if not pieces:
        raise CorpusError(f"the text is too short: it has no document of {MIN_WINDOW} tokens")
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    return Windows(np.concatenate(pieces), starts, control_ids(tokenizer), window, source, np.array(document))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, if the tokenizer starts texts with it; otherwise nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def control_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """BOS, EOS and what else the tokenizer marks as special, such as a chat template's ``<|im_start|>``.

    At role markers as at BOS no model is asked for the next token: the template writes it. The unknown token is not among
    them: it stands for words of the text.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != tokenizer.unk_token_id}
    return tuple(sorted(special | {i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None}))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's largest id plus one; a model may have more rows, as padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_context(window: int, config: PretrainedConfig) -> None:
    """Raise SettingError if a model cannot read `window` tokens at once."""
    context = context_length(config)
    if context is not None and window > context:
        raise SettingError(f"a window of {window} tokens does not fit the model's context of {context}")


def check_ids(ids: Tensor | NDArray[np.integer], vocab_size: int) -> None:
    """Raise CorpusError if a model of `vocab_size` tokens does not have one of these ids."""
    if (largest := int(ids.max())) >= vocab_size:
        raise CorpusError(f"the tokenizer gives ids up to {largest}, the model has {vocab_size}: they do not belong together")


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model can read at once; None if it does not say."""
    return getattr(config, "max_position_embeddings", None)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Tokens of the text as it stands, part by part; parts end before a space, where words end too."""
    first = 0
    while first < len(text):
        last = first + PART_CHARACTERS
        if last < len(text) and (space := text.rfind(" ", first + 1, last)) > 0:
            last = space
        yield from tokenizer(text[first:last], add_special_tokens=False, verbose=False)["input_ids"]
        first = last


def _apply_chat_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CorpusError("the tokenizer has no chat template: it is not a chat model's; give plain text")
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in conversation], tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise CorpusError(f"the chat template refuses conversation {number}: {error}") from error
