"""Completions of a steered transformers model, token by token, for several clients at once.

Clients take turns step by step. Each has a cache of its own, and the model is steered anew before each step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.errors import CorpusError
from confsteer.runtimes.positions import Window, marker_of
from confsteer.runtimes.transformers import Steerer
from confsteer.steering import MAX_CHARACTERS, Steering
from confsteer.text.spelling import Spelling
from confsteer.text.windows import check_ids, prompt_ids

MAX_TOKENS = 4096
MAX_LOGPROBS = 20
"""Most alternatives to a token that a client may ask for: vLLM's default."""
MAX_PROMPT = 200_000
"""Most characters of a prompt."""
CONTEXT = 4
"""Tokens of the prompt that are decoded before the answer, because some tokenizers leave out a text's first space."""


class Extra(BaseModel):
    """Arguments beyond OpenAI's, in vLLM's form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    confsteer: Annotated[str, Field(max_length=MAX_CHARACTERS)] = "neutral"
    """The steering, as text or as JSON in text."""


class CompletionRequest(BaseModel):
    """The part of OpenAI's completions API that is answered here. Anything else is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_PROMPT)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 16
    temperature: Annotated[float, Field(ge=0, le=5)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool = False
    vllm_xargs: Extra = Extra()


class Token(NamedTuple):
    """A token that was generated."""

    text: str
    """Text that it adds to the answer. Empty while a character is incomplete."""
    name: str
    """Text of the token alone."""
    logprob: float
    """Log-probability before the sampling temperature, in nats."""
    top: dict[str, float]
    """Log-probabilities of the likeliest tokens, by their names."""
    entropy: float
    """Entropy of the prediction, in nats."""
    ends: Literal["length"] | None
    """Whether it is the last token of the answer."""


class Completions:
    """A steered model that answers requests.

    Args:
        model: the model, within the context of `steerer`.
        tokenizer: its tokenizer.
        steerer: the model's steerer, for one steering.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steerer: Steerer) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._steerer = steerer
        self._turn = threading.Lock()
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._spelling = Spelling(tokenizer)
        self.name_of = self._spelling.text_of

    def start(self, request: CompletionRequest) -> Iterator[Token]:
        """Check a request now, and answer it as the iterator is read.

        Raises:
            SteeringError, NoNeuronsError: the steering is malformed or out of reach.
            CorpusError: the prompt has no tokens, or the answer would be longer than the model's context.
        """
        steering = self._steerer.profile.resolve(Steering.parse(request.vllm_xargs.confsteer))
        window = Window(steering.positions, marker_of(steering.positions, lambda: self._spelling))
        # Steer a pass everywhere or nowhere: an answer uses the last position's prediction alone, and no cache remembers the
        # last layer's MLP.
        steering = steering.model_copy(update={"positions": "all"})
        with self._turn:
            self._steerer.update(steering)
        given = prompt_ids(request.prompt, self._tokenizer, chat=False)
        if not given:
            raise CorpusError("the prompt has no tokens: there is nothing to continue")
        check_ids(torch.tensor([given]), self._steerer.profile.model.vocab_size)
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(given) + request.max_tokens > room:
            raise CorpusError(
                f"{len(given):,} tokens of prompt and {request.max_tokens:,} of answer are more than the model's {room:,}: "
                "ask for less"
            )
        return self._tokens(given, steering, window, request)

    def _tokens(self, given: list[int], steering: Steering, window: Window, request: CompletionRequest) -> Iterator[Token]:
        generator = torch.Generator().manual_seed(request.seed)
        ids, cache, written = list(given), None, self._decode(given[-CONTEXT:])
        for step in range(request.max_tokens):
            with self._turn, torch.inference_mode():
                self._steerer.update(steering if window.steers(step) else Steering())
                last = torch.tensor([ids if cache is None else ids[-1:]], device=self._model.device)
                output = self._model(input_ids=last, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            log_p = output.logits[0, -1].float().cpu().log_softmax(-1)
            chosen = _draw(log_p, request.temperature, generator)
            if chosen in self._ends:
                return
            ids.append(chosen)
            window.read([chosen], at=step)
            text = self._decode(ids[len(given) - len(given[-CONTEXT:]) :])
            # Wait for the rest of a character.
            new = "" if text.endswith("\ufffd") else text[len(written) :]
            written = text if new else written
            values, likeliest = log_p.topk(min(request.logprobs or 0, len(log_p)))
            yield Token(
                text=new,
                name=self.name_of(chosen),
                logprob=float(log_p[chosen]),
                top={self.name_of(i): value for i, value in zip(likeliest.tolist(), values.tolist(), strict=True)},
                entropy=float(torch.special.entr(log_p.exp()).sum()),
                ends="length" if step == request.max_tokens - 1 else None,
            )

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _draw(log_p: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Sample a token: the largest of the log-probabilities with Gumbel noise.

    The noise depends only on the step and the seed. So two steerings draw different tokens only where they disagree enough.

    Args:
        log_p: ``[vocab]``.
        temperature: sampling temperature; 0 for the likeliest token.
        generator: random generator of the noise.
    """
    noise = -(-torch.rand(log_p.shape, generator=generator).log()).log()
    return int((log_p / temperature + noise if temperature else log_p).argmax())
