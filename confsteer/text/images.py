"""Conversations with images: files to images, and both to what a model is given, by its processor.

Pixels are held in memory as the processor makes them: two to fifty kilobytes for each token that stands for an image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import ProcessorMixin

from confsteer.errors import CorpusError
from confsteer.files import MAX_IMAGE_BYTES, read_at_most
from confsteer.text.windows import Conversation, Document, SeenConversation, message_texts

if TYPE_CHECKING:
    from PIL.Image import Image

FILE_KEYS = ("image", "path", "url")
"""Names that a part of type ``image`` gives its file, as transformers' chat templates have it."""


def with_images(
    documents: Iterable[Document], processor: ProcessorMixin | Callable[[], ProcessorMixin]
) -> Iterator[Document | SeenConversation]:
    """Make of each conversation with images what its model is given; pass other documents on as they are.

    A message's content is a list of parts, such as ``{"type": "text", "text": …}`` and ``{"type": "image", "path": …}``. The
    image is that of a file (also as ``url`` or ``image``), or in Python a ``PIL.Image.Image`` as ``image``. Nothing is fetched
    from the network. The processor's chat template and its image processor do the rest, as when the model is served.

    Args:
        documents: strings, or conversations.
        processor: the model's, such as ``AutoProcessor.from_pretrained`` gives it; or what loads it, called at the first image.

    Raises:
        CorpusError: a file is no image, missing, or larger than `MAX_IMAGE_BYTES`; or the processor refuses a conversation, or
            leaves out some of it; or Pillow is missing.
    """
    for number, document in enumerate(documents, start=1):
        if isinstance(document, str) or not has_images(document):
            yield document
            continue
        if not isinstance(processor, ProcessorMixin):
            processor = processor()
        yield _see(document, processor, f"conversation {number}")


def has_images(conversation: Conversation) -> bool:
    """Say whether a message has a part that is an image."""
    return any(_is_image(part) for message in conversation for part in _parts(message))


def without_images(conversation: Conversation) -> list[Mapping[str, Any]]:
    """Leave the images out of a conversation: messages whose parts are text."""
    return [
        {**message, "content": [part for part in _parts(message) if not _is_image(part)]}
        if any(map(_is_image, _parts(message)))
        else message
        for message in conversation
    ]


def place_images(conversation: Conversation, images: Sequence[Any], where: str) -> list[Mapping[str, Any]]:
    """Give the images of a record to the parts that name none, in their order.

    Args:
        conversation: with parts ``{"type": "image"}``.
        images: files, or images.
        where: they are from, for the message.

    Raises:
        CorpusError: there are more of the one than of the other.
    """
    waiting = list(images)
    placed: list[Mapping[str, Any]] = []
    places = 0
    for message in conversation:
        parts = list(_parts(message))
        for i, part in enumerate(parts):
            if _is_image(part) and _file_of(part) is None:
                places += 1
                parts[i] = {**part, "image": waiting.pop(0)} if waiting else part
        placed.append({**message, "content": parts} if parts else message)
    if places != len(images):
        raise CorpusError(f"{where}: the messages have {places} parts for an image without a file, the record has {len(images)}")
    return placed


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list | tuple) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _file_of(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in FILE_KEYS if part.get(key) is not None), None)


def _see(conversation: Conversation, processor: ProcessorMixin, where: str) -> SeenConversation:
    """Run the processor, and see to it that it read everything."""
    message_texts(without_images(conversation), where)  # raises if there is something else
    messages, images = _messages(conversation, where)
    name = type(processor).__name__
    try:
        rendered = _rendered(processor, messages, messages, where)
    except CorpusError:
        # A template may know parts where there are images, and else strings alone.
        given = [message.get("content") for message in conversation]
        strings = [{**m, "content": one} if isinstance(one, str) else m for m, one in zip(messages, given, strict=True)]
        rendered, messages = _rendered(processor, strings, messages, where), strings
    if (places := rendered.count(str(getattr(processor, "image_token", None)))) != images:
        raise CorpusError(
            f"{where} has {images} images, and the chat template of {name} makes place for {places}: it does not know images, or "
            "a text spells what stands for one"
        )
    made = _applied(processor, messages, where, tokenize=True, return_dict=True, return_tensors="pt")
    ids = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    placeholders = _placeholder_ids(processor).intersection(ids)
    odd = [key for key, value in made.items() if not isinstance(value, Tensor)]
    if odd or not placeholders:
        what = f"gives {odd[0]!r} as no tensor" if odd else "does not say which tokens stand for an image"
        raise CorpusError(f"{where}: {name} {what}: models with such processors are not measured on images")
    return SeenConversation(ids, dict(made), frozenset(placeholders), where)


def _rendered(processor: ProcessorMixin, messages: list[dict[str, Any]], parts: list[dict[str, Any]], where: str) -> str:
    """Apply the chat template to messages, which are `parts` in one form or another, and look for all of their text."""
    rendered = str(_applied(processor, messages, where, tokenize=False))
    for number, message in enumerate(parts, start=1):
        if not all(part["text"].strip() in rendered for part in message["content"] if part["type"] == "text"):
            name = type(processor).__name__
            raise CorpusError(f"{where}: the chat template of {name} leaves out text of message {number}: leave it out yourself")
    return rendered


def _applied(processor: ProcessorMixin, messages: list[dict[str, Any]], where: str, **how: Any) -> Any:
    """Apply the processor's chat template; processor and template raise many kinds of errors."""
    try:
        return processor.apply_chat_template(messages, **how)
    except Exception as error:
        raise CorpusError(f"the model's processor refuses {where}: {str(error) or type(error).__name__}") from error


def _messages(conversation: Conversation, where: str) -> tuple[list[dict[str, Any]], int]:
    """Write all content as parts, the form that templates with images take, and read the images, which are counted."""
    messages, images = [], 0
    for message in conversation:
        content = message.get("content")
        parts: Sequence[Any] = [content] if isinstance(content, str) else _parts(message)
        form: list[dict[str, Any]] = []
        for part in parts:
            if _is_image(part):
                images += 1
                form.append({"type": "image", "image": _image(part, f"{where}, image {images}")})
            else:
                form.append({"type": "text", "text": part if isinstance(part, str) else part["text"]})
        messages.append({**message, "content": form})
    return messages, images


def _image(part: Mapping[str, Any], where: str) -> Image:
    """Read an image as transformers reads it: upright, in RGB.

    Raises:
        CorpusError: see `with_images`.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise CorpusError(f"{where}: images need Pillow: pip install pillow") from error

    given = _file_of(part)
    if isinstance(given, Image.Image):
        return ImageOps.exif_transpose(given).convert("RGB")
    if not isinstance(given, str):
        raise CorpusError(f'{where} has no file: {{"type": "image", "path": FILE}}, or an image for it in the record\'s "images"')
    if given.startswith("data:") or "://" in given:
        raise CorpusError(f"{where} is at {given[:80]}, and nothing is fetched: save it, and give the path of the file")
    try:
        payload = read_at_most(given, MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{where}: cannot read {given}: {getattr(error, 'strerror', None) or error}") from error
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds: of a format it does not know, of a file cut short, of a bomb
        raise CorpusError(f"{where}: {given} is not an image that Pillow reads: {error}") from error


def _placeholder_ids(processor: Any) -> set[int]:
    """Collect the ids that stand for a part of an image, by the names that processors give them."""
    own = getattr(processor, "image_token_ids", None) or (getattr(processor, "image_token_id", None),)
    return {i for i in (*own, getattr(processor.tokenizer, "image_token_id", None)) if isinstance(i, int)}
