"""Documents to token windows, and which positions of a window count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
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
MAX_PARTS = 1000
"""Parts tokenized at once, which a tokenizer shares out over the cores."""
MAX_PROBES = 100
"""Words tried to tell a text's own tokens from those around them; one does, but for tokenizers of a few words."""


Conversation = Sequence[Mapping[str, Any]]
"""Messages with ``role`` and ``content``, which is a string, null, or a list of parts of type ``text``."""
Document = str | Conversation


class SeenConversation(NamedTuple):
    """A conversation with images, as a model is given it: see `confsteer.text.images.with_images`."""

    token_ids: Sequence[int]
    """Those that stand for images included."""
    inputs: Mapping[str, Tensor]
    """Tensors that the model is given beside the ids, pixel values and the like, by the names of its arguments."""
    placeholder_ids: frozenset[int]
    """Ids that stand for a part of an image."""
    where: str
    """It is from, for messages."""


Documents = Iterable[Document | SeenConversation]
PLACEHOLDER = "confsteer-content"
"""Stands for a message's content, to see what a template does with a string."""


@dataclass(frozen=True)
class WindowBatch:
    """A few windows, padded on the right to the longest."""

    input_ids: Tensor
    """``[windows, length]``"""
    attention_mask: Tensor
    """``[windows, length]``, 0 on padding."""
    kept: Tensor
    """Positions that count, ``[windows, length]`` bool; the next token is inside the window at each."""
    text: int
    """Number of the text that they are of."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the model is given beside the tokens, by the names of its arguments; such a window is a batch by itself."""

    @property
    def targets(self) -> Tensor:
        """Take the token that follows each kept position, ``[kept tokens]``."""
        return self.input_ids.roll(-1, dims=1)[self.kept]

    @property
    def window(self) -> Tensor:
        """Number, within the batch, the window each kept position is in, ``[kept tokens]``."""
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
    """A description of the text, for the profile."""
    document: NDArray[np.int64]
    """Number of the document that each window is of, ``[windows]``; windows that cross documents are all of one."""
    text_starts: tuple[int, ...] = (0,)
    """First window of each text, where they are of several: see `confsteer.text.several.join_windows`."""
    inputs: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """Tensors that the model is given beside the tokens, see `WindowBatch`, by the number of the window; held in memory."""
    placeholder_ids: frozenset[int] = frozenset()
    """Ids that stand for images, which do not count, nor does the token before each, whose next one they are."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """Count the tokens of each text."""
        first_tokens = [*self.starts[list(self.text_starts)].tolist(), self.n_tokens]
        return tuple(end - start for start, end in pairwise(first_tokens))

    @property
    def sha256(self) -> str:
        """Hash of the token ids, of where the windows start, and of the images."""
        digest = hashlib.sha256(self.token_ids.astype("<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        for number, inputs in sorted(self.inputs.items()):
            for name, value in sorted(inputs.items()):
                digest.update(f"{number} {name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def blocks(self) -> tuple[NDArray[np.int64], Literal["documents", "windows"]]:
        """Number what of the text is unlike the rest, by window ``[windows]``, and name it.

        Documents, if there are `MIN_DOCUMENTS`; windows of a text that has fewer.
        """
        if len(np.unique(self.document)) >= MIN_DOCUMENTS:
            return self.document, "documents"
        return np.arange(len(self)), "windows"

    def counts(self, vocab_size: int) -> Tensor:
        """Count how often each token occurs, control tokens and images left out, ``[vocab_size]`` int64."""
        counts = np.bincount(self.token_ids, minlength=vocab_size)
        counts[[i for i in (*self.special_ids, *self.placeholder_ids) if i < len(counts)]] = 0
        return torch.from_numpy(counts)

    def batches(self, batch_size: int) -> Iterator[WindowBatch]:
        """Yield the windows in order, `batch_size` at a time; see `batch_ranges`."""
        for text, numbers in self.batch_ranges(batch_size):
            windows = [self.token_ids[self.starts[i] : self.starts[i + 1]] for i in numbers]
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
                text,
                self.inputs.get(numbers.start, {}),
            )

    def batch_ranges(self, batch_size: int) -> Iterator[tuple[int, range]]:
        """Yield the number of the text and the numbers of the windows of each batch.

        A window with images is a batch by itself, because tensors of images differ in shape. The batch before it may have fewer
        windows than `batch_size`, as may the last of a text.
        """
        for text, (start, end) in enumerate(pairwise([*self.text_starts, len(self)])):
            ends = {end, *(i for window in self.inputs if start <= window < end for i in (window, window + 1))} - {start}
            first = start
            for last in sorted(ends):
                for one in range(first, last, batch_size):
                    yield text, range(one, min(one + batch_size, last))
                first = last

    def check_counted(self) -> None:
        """
        Raises:
            CorpusError: no position counts.
        """
        if not any(bool(batch.kept.any()) for batch in self.batches(1)):
            raise CorpusError(
                f"{self.source}: no token counts: after the first {FIRST_POSITIONS} of a window there are only control tokens, "
                "and the token after each. Give text that the tokenizer does not read as special tokens"
            )

    def _kept(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Leave out the first positions, the last of each window, control tokens and the token after these, and images."""
        kept = attention_mask.astype(bool)
        kept[:, :-1] &= attention_mask[:, 1:].astype(bool)
        kept[:, -1] = False
        kept[:, :FIRST_POSITIONS] = False
        special = np.isin(input_ids, self.special_ids)
        kept &= ~special
        kept[:, 1:] &= ~special[:, :-1]
        image = np.isin(input_ids, list(self.placeholder_ids))
        kept &= ~image
        kept[:, :-1] &= ~image[:, 1:]
        return kept


class TokenizedDocument(NamedTuple):
    """A document as `cut_windows` takes it."""

    start: Sequence[int]
    """Ids that each of its windows begins with: BOS or the like, or none."""
    token_ids: Iterable[int]
    """The rest; it is read no further than needed."""


def make_windows(
    documents: Documents | Windows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = WINDOW,
    max_tokens: int | None = None,
    cross_documents: bool = False,
    source: str = SOURCE,
) -> Windows:
    """Tokenize documents into windows.

    Every window of a text starts with what the tokenizer puts in front of texts, such as BOS. A conversation becomes what the
    model is served: the ids of the tokenizer's chat template, nothing added; if they start with the same, so do the windows
    that continue it. Content that is null or in parts is given in the form that the template takes. All turns count, the user's
    as well: few templates tell which tokens are the assistant's. What templates put around turns does not count where it is a
    control token (see `control_ids`).

    A conversation with images (see `confsteer.text.images.with_images`) is one window, whole: its images are of all of it.

    Args:
        documents: strings, or conversations; or windows already made, which are returned as they are.
        tokenizer: the model's.
        window: tokens per window, those in front included.
        max_tokens: stop here, and read no more documents than that takes; all if None.
        cross_documents: cut texts as pre-training does, joined with EOS between them, so that all windows but the last are
            full.
        source: a description of the text for the profile.

    Raises:
        SettingError: `window` or `max_tokens` is too small; or `cross_documents` with conversations, or without an EOS token.
        CorpusError: there are not enough tokens for one window; or there is no chat template, or it refuses a conversation; or
            a message has other content than text; or a conversation with images is longer than a window.
    """
    if isinstance(documents, Windows):
        return documents
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = leading_ids(tokenizer)

    def tokenized() -> Iterator[TokenizedDocument | SeenConversation]:
        for number, document in enumerate(documents, start=1):
            if isinstance(document, str):
                yield TokenizedDocument(start, _token_ids(document, tokenizer))
            elif cross_documents:
                raise SettingError("conversations are served one by one: windows of them cannot cross documents")
            elif isinstance(document, SeenConversation):
                yield document
            else:
                ids = _token_ids(apply_chat_template(document, tokenizer, f"conversation {number}"), tokenizer)
                # A template may write BOS where the tokenizer puts none.
                first = list(islice(ids, len(start) or 1))
                starts = bool(first) and first == (start or [bos])
                yield TokenizedDocument(first, ids) if starts else TokenizedDocument([], chain(first, ids))

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
    documents: Iterable[TokenizedDocument | SeenConversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    max_tokens: int | None = None,
    source: str,
) -> Windows:
    """Cut token ids into windows. A document's last, shorter window is kept if it has `MIN_WINDOW` tokens.

    Args:
        documents: see `TokenizedDocument`; a conversation with images is one window.
        tokenizer: what the ids are of.
        window: tokens per window, the document's start included.
        max_tokens: stop here, and before a conversation with images that would go beyond; the whole text if None.
        source: a description of the text for the profile.

    Raises:
        SettingError: `window` or `max_tokens` is too small.
        CorpusError: there are not enough tokens for one window; or a conversation with images is longer than a window.
    """
    if window < MIN_WINDOW:
        raise SettingError(f"a window of {window} tokens is too short; use at least {MIN_WINDOW}")
    if max_tokens is not None and max_tokens < MIN_WINDOW:
        raise SettingError(f"{max_tokens} tokens make no window; read at least {MIN_WINDOW}")
    pieces: list[NDArray[np.int32]] = []
    document: list[int] = []
    inputs: dict[int, Mapping[str, Tensor]] = {}
    placeholder_ids: frozenset[int] = frozenset()
    total = 0
    for number, one in enumerate(documents):
        if isinstance(one, SeenConversation):
            if not _fits(one, window, None if max_tokens is None else max_tokens - total, first=not pieces):
                break
            inputs[len(pieces)] = one.inputs
            placeholder_ids |= one.placeholder_ids
            pieces.append(np.asarray(one.token_ids, dtype=np.int32))
            document.append(number)
            total += len(one.token_ids)
            continue
        start, token_ids = one
        if len(start) >= window:
            raise SettingError(f"a window of {window} tokens has no room for text after the {len(start)} that start every text")
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
    return Windows(
        np.concatenate(pieces),
        starts,
        control_ids(tokenizer),
        window,
        source,
        np.array(document),
        inputs=inputs,
        placeholder_ids=placeholder_ids,
    )


def _fits(conversation: SeenConversation, window: int, room: int | None, *, first: bool) -> bool:
    """Say whether a conversation with images goes into the `room` that is left, of which there is no end if None.

    Raises:
        CorpusError: it is longer than a window, or the `first` and longer than all that is read.
    """
    tokens, where = len(conversation.token_ids), conversation.where
    if tokens > window:
        raise CorpusError(
            f"{where} has {tokens:,} tokens with its images, which cannot be cut, and a window has {window:,}: use windows of at "
            f"least {tokens:,} (--window, window=), or leave the conversation out"
        )
    if first and room is not None and tokens > room:
        raise CorpusError(f"{where} has {tokens:,} tokens with its images, which cannot be cut: read more than {room:,}")
    return room is None or tokens <= room


def token_ids_in_parts(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[int]]]:
    """Tokenize documents of any number and length as they stand, a few million characters at a time.

    Args:
        documents: see `make_windows`.
        tokenizer: the model's.

    Yields:
        Ids of each of a few parts of documents, without what the tokenizer puts around texts.

    Raises:
        CorpusError: there is no chat template for conversations, or it refuses one; or a message has other content than text.
    """

    def parts() -> Iterator[str]:
        for number, document in enumerate(documents, start=1):
            if not isinstance(document, str):
                document = apply_chat_template(document, tokenizer, f"conversation {number}")
            yield from _parts(document)

    batch: list[str] = []
    for part in parts():
        batch.append(part)
        if sum(map(len, batch)) >= PART_CHARACTERS or len(batch) >= MAX_PARTS:
            yield tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            batch = []
    if batch:
        yield tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool | None = None) -> list[int]:
    """Tokenize a prompt to continue, or to answer.

    Args:
        prompt: text as it stands, or the user's turn of a chat.
        tokenizer: the model's.
        chat: whether it goes through the chat template, which writes all special tokens itself; where there is one, if None.

    Raises:
        CorpusError: there is no chat template, or it refuses the prompt.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat:
        turn = {"role": "user", "content": prompt}
        return [*_token_ids(apply_chat_template([turn], tokenizer, "the prompt", answer=True), tokenizer)]
    return list(tokenizer(prompt)["input_ids"])


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find what the tokenizer puts in front of every text: BOS in most, ``[gMASK]<sop>`` in GLM-4, or nothing."""
    return surrounding_ids(tokenizer)[0]


def surrounding_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find what the tokenizer puts in front of every text and after it.

    Assumed: these are the same for all texts, and control tokens, so that they do not count.

    Raises:
        CorpusError: the tokens of a text are others when special tokens are added to them.
    """
    possible: set[tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    for text in islice(_probes(tokenizer), MAX_PROBES):
        whole, own = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        if not own:
            continue
        firsts = range(len(whole) - len(own) + 1)
        found = {(tuple(whole[:i]), tuple(whole[i + len(own) :])) for i in firsts if whole[i : i + len(own)] == own}
        possible = found if possible is None else possible & found
        if not possible:
            break
        if len(possible) == 1:
            ((before, after),) = possible
            return list(before), list(after)
    raise CorpusError(
        "what the tokenizer puts in front of a text is not to be told: its tokens are others when special ones are added to them"
    )


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from ("a", "1", "the")
    # An unknown word may become the very token that is put in front; these are known.
    yield from (str(tokenizer.decode([i])) for i in tokenizer.get_vocab().values())


def control_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """List BOS, EOS and what else the tokenizer marks as special, such as a chat template's ``<|im_start|>``.

    At role markers as at BOS no model is asked for the next token: the template writes it. The unknown token is not among
    them: it stands for words of the text.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != tokenizer.unk_token_id}
    return tuple(sorted(special | {i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None}))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Take the tokenizer's largest id plus one; a model may have more rows, as padding."""
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
    """Say how many tokens a model can read at once; None if it does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Yield the tokens of the text as it stands, part by part."""
    for part in _parts(text):
        yield from tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]


def _parts(text: str) -> Iterator[str]:
    """Cut a long text before spaces, where words end too."""
    first = 0
    while first < len(text):
        last = first + PART_CHARACTERS
        if last < len(text) and (space := text.rfind(" ", first + 1, last)) > 0:
            last = space
        yield text[first:last]
        first = last


def message_texts(conversation: Conversation, where: str) -> list[str | None]:
    """Read the text of each message: of null none, of several parts one under the other, as servers join them.

    Args:
        conversation: messages.
        where: they are from, for the message.

    Returns:
        None for a message without content.

    Raises:
        CorpusError: a message has other content than text, such as an image.
    """
    texts: list[str | None] = []
    for number, message in enumerate(conversation, start=1):
        content = message.get("content")
        if not (content is None or isinstance(content, str | list | tuple)):
            raise CorpusError(
                f"{where}: the content of message {number} is {json_kind(content)}, neither text nor a list of parts"
            )
        strings: list[str] = []
        for part in [content or ""] if content is None or isinstance(content, str) else content:
            string = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
            if not isinstance(string, str):
                kind = f"type {part.get('type')!r}" if isinstance(part, Mapping) else json_kind(part)
                raise CorpusError(
                    f"{where}: message {number} has a part that is no text ({kind}), and only text is read here: leave the "
                    "conversation out, or that part"
                )
            strings.append(string)
        texts.append("\n".join(strings) if "content" in message else None)
    return texts


def apply_chat_template(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str, *, answer: bool = False
) -> str:
    """Render a conversation, each content in the form that the template takes; up to the model's answer if `answer`.

    A template that knows strings alone prints Python of null and of parts; one that knows parts alone prints nothing of a
    string. Servers give each the form it takes, which shows in what it prints.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CorpusError("the tokenizer has no chat template: it is not a chat model's; give plain text")
    failures = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
    texts = message_texts(conversation, where)
    messages = [
        dict(message) if text is None else {**message, "content": text} for message, text in zip(conversation, texts, strict=True)
    ]

    def render() -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))

    def attempt() -> str | None:
        try:
            return render()
        except failures:
            return None

    rendered = attempt()
    for message, given, text in zip(messages, conversation, texts, strict=True):
        is_string = text is None or isinstance(given["content"], str)
        if text is None or (is_string and rendered is not None and text.strip() in rendered):
            continue
        parts = [text] if is_string else given["content"]
        form = parts and [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        if not _takes(message, form, attempt, instead=is_string):
            message["content"] = text
    try:
        return render()
    except failures as error:
        raise CorpusError(f"the chat template refuses {where}: {error}") from error


def _takes(message: dict[str, Any], form: Any, attempt: Callable[[], str | None], *, instead: bool) -> bool:
    """Give a message its content in another form than a string, and say whether the template knows that form.

    Args:
        message: gets the content, **in place**.
        form: null or parts.
        attempt: renders the conversation; None if the template fails.
        instead: whether the template must know this form instead of strings, some of which it may have reasons to leave out.
    """
    message["content"] = PLACEHOLDER
    of_a_string = attempt() or ""
    message["content"] = form
    rendered = attempt()
    if rendered is None or (instead and PLACEHOLDER in of_a_string):
        return False
    # Python shows: of parts it is unlike any text, of null what stands where a string would.
    as_python = of_a_string.replace(PLACEHOLDER, str(form)) if PLACEHOLDER in of_a_string else None
    if rendered == as_python or (form and str(form) in rendered):
        return False
    return all(part["text"].strip() in rendered for part in form or ())


def json_kind(value: Any) -> str:
    """Name a value as JSON does."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
