"""The same requests through vLLM and through transformers, log-probability by log-probability."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

import confsteer
from confsteer import Profile, Steering, demo
from confsteer.model.loading import DEMO
from confsteer.steering import After, First
from tests.mixtures import planted_experts
from tests.planted import Planted, planted

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
TOLERANCE = 1e-4
"""Of log-probabilities in float32, in nats."""
TEETH = 1e-3
"""What a steered request would be off by, at least, if it were not steered."""
TIED = ("gemma", "gemma2", "cohere")
"""Families that vLLM only loads with tied embeddings."""


class Subject(NamedTuple):
    """A model in transformers, and the folders that vLLM reads it and its profile from."""

    model: Any
    profile: Profile
    model_folder: Path
    profile_folder: Path


class Ask(NamedTuple):
    """One request."""

    prompt: list[int]
    steering: Any
    """As it is sent."""
    tokens: int = 6


class Difference(NamedTuple):
    """Largest over a request's log-probabilities."""

    error: float
    """Between vLLM and transformers."""
    teeth: float
    """Between transformers as asked and unsteered."""


def subject(model_type: str, folder: Path) -> Subject:
    """A tiny model with planted neurons, saved with its profile, which has a preset."""
    return saved(planted(model_type, wide=True, tied=model_type in TIED), folder)


def mixture(model_type: str, folder: Path, **config: Any) -> Subject:
    """A tiny mixture of experts with planted neurons, of routed experts and of a shared one if there is one."""
    return saved(planted_experts(model_type, wide=True, **config), folder)


def with_direction(found: Planted, folder: Path) -> Subject:
    """The same with an entropy dial that turns a null direction."""
    profile = confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, source="zipf", null_direction=True)
    return saved(found._replace(profile=profile), folder)


def saved(found: Planted, folder: Path) -> Subject:
    """Save a model and its profile, which gets a preset, where vLLM can read them."""
    calm = Steering(entropy=0.5 * found.profile.reach("entropy")[1]) if "entropy" in found.profile.response else Steering()
    for neuron in found.profile.steerable[:1]:
        calm = Steering(scale={neuron.key: 0.0}, shift={neuron.key: 8 * neuron.std_activation})
    profile = found.profile.with_preset("calm", calm)
    found._replace(profile=profile).save(folder)
    return Subject(found.model, profile, folder / "model", folder / "profile")


def steerings(profile: Profile) -> list[Any]:
    """Some of everything that can be asked for, as JSON, as text and as an object; None first."""
    asked: list[Any] = [None, {"preset": "calm"}, "preset=calm positions=generated"]
    for dial in profile.response:
        low, high = profile.reach(dial)
        if high < 0.01:
            continue
        asked += [{dial: 0.8 * high}, f'{{"{dial}": {0.5 * high}}}', {dial: 0.5 * high, "positions": "generated"}]
        asked.append(f"{dial}={0.8 * high} positions=first:3")
        if low < -0.01:
            asked.append(f"{dial}={0.8 * low}")
    for neuron in profile.steerable:
        mean, deviation = neuron.mean_activation, neuron.std_activation
        asked += [
            f"scale.{neuron.key}=-4",
            {"scale": {neuron.key: 0.5}, "shift": {str(neuron.key): -3 * deviation}},
            {"clamp": {str(neuron.key): [mean + 20 * deviation, None]}},
            f"clamp.{neuron.key}={mean - 5 * deviation}",
        ]
    return asked


def prompts(count: int, *, vocabulary: int, longest: int, seed: int) -> list[list[int]]:
    """Random tokens, of many lengths; every third begins like the one before."""
    generator = torch.Generator().manual_seed(seed)
    made: list[list[int]] = []
    for i in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        made.append(made[-1][: len(made[-1]) // 2] + ids[: longest // 2] if i % 3 == 2 else ids)
    return made


def sampling(ask: Ask, **options: Any) -> Any:
    """`SamplingParams` of a request, with every log-probability that vLLM gives."""
    from vllm import SamplingParams

    extra = None if ask.steering is None else {"confsteer": ask.steering}
    # No seed: vLLM's generators on the CPU do not go together with chunked prefill.
    settings = {"max_tokens": ask.tokens, "ignore_eos": True, "logprobs": 5, "extra_args": extra, "detokenize": False}
    # Greedy where Triton's interpreter would take minutes to draw samples.
    return SamplingParams(**settings, **({"temperature": 0.0} if V2 else {}) | options)


def ask_all(llm: Any, asks: Sequence[Ask], **options: Any) -> list[Any]:
    """All requests at once."""
    return list(
        llm.generate(
            [{"prompt_token_ids": ask.prompt} for ask in asks], [sampling(ask, **options) for ask in asks], use_tqdm=False
        )
    )


def compare(subject: Subject, asks: Sequence[Ask], outputs: Sequence[Any]) -> list[Difference]:
    """How far vLLM's log-probabilities are from those of transformers, request by request."""
    differences = []
    for ask, output in zip(asks, outputs, strict=True):
        assert list(output.prompt_token_ids) == ask.prompt
        for completion in output.outputs:
            assert len(completion.token_ids) == ask.tokens
            text = ask.prompt + list(completion.token_ids)
            seen = {len(ask.prompt) + i: row for i, row in enumerate(completion.logprobs)}
            seen |= {i: row for i, row in enumerate(output.prompt_logprobs or []) if row is not None}
            differences.append(difference(subject, text, len(ask.prompt), ask.steering, seen))
    return differences


def difference(subject: Subject, text: list[int], prompt: int, steering: Any, seen: dict[int, Any]) -> Difference:
    """Of the log-probabilities `seen`: position in the text -> token -> (an object with) its log-probability."""
    asked = expected(subject, text, prompt, steering)
    plain = expected(subject, text, prompt, None)
    error = teeth = 0.0
    for position, row in seen.items():
        for token, value in row.items():
            logprob = getattr(value, "logprob", value)
            error = max(error, abs(float(asked[position - 1, token]) - logprob))
            teeth = max(teeth, abs(float(asked[position - 1, token] - plain[position - 1, token])))
    return Difference(error, teeth)


def expected(subject: Subject, text: list[int], prompt: int, steering: Any) -> Tensor:
    """Log-probabilities after each token of a text ``[tokens, vocab]``, of which `prompt` tokens were given."""
    asked = subject.profile.resolve(Steering.parse({} if steering is None else steering))
    if isinstance(asked.positions, First | After):
        everywhere = asked.model_copy(update={"positions": "all"})
        steered, plain = (expected(subject, text, prompt, one) for one in (everywhere, None))
        inside = [_is_inside(subject, text[prompt : position + 1], position + 1 - prompt, asked) for position in range(len(text))]
        return torch.where(torch.tensor(inside)[:, None], steered, plain)
    steer: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if steering is not None:
        steer = confsteer.steer(subject.model, subject.profile, steering)
    with torch.no_grad(), steer as steerer:
        if steerer is None or steerer.positions == "all":
            logits = subject.model(torch.tensor([text])).logits[0]
        else:
            # As generate() does: one pass over the prompt, then a token at a time.
            passes = [text[:prompt], *([token] for token in text[prompt:])]
            cache, rows = None, []
            for ids in passes:
                output = subject.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(output.logits[0])
            logits = torch.cat(rows)
    return torch.log_softmax(logits, -1)


def _is_inside(subject: Subject, generated: list[int], number: int, asked: Steering) -> bool:
    """Whether the choice of a generated token is inside of a window, by its definition."""
    if isinstance(asked.positions, First):
        return 0 <= number < asked.positions.first
    assert isinstance(asked.positions, After)
    marker = asked.positions.after
    if isinstance(marker, str):
        return marker in str(AutoTokenizer.from_pretrained(subject.model_folder).decode(generated))
    return any(tuple(generated[i : i + len(marker)]) == marker for i in range(len(generated) + 1 - len(marker)))


def windows(subject: Subject, count: int, *, tokens: int, longest: int, seed: int = 0) -> list[Ask]:
    """Requests by windows, whose markers are in what the model goes on with if it is greedy; as ids, and as text."""
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(subject.model_folder), subject.profile.model.tokenizer_size
    change, asks = 0.8 * subject.profile.reach("entropy")[1], []
    for i, prompt in enumerate(prompts(count, vocabulary=vocabulary, longest=longest, seed=seed)):
        text = list(prompt)
        for _ in range(tokens // 2):
            with torch.no_grad():
                text.append(int(subject.model(torch.tensor([text])).logits[0, -1].argmax()))
        marker = text[-2:]
        kinds: list[Any] = [{"after": marker}, {"after": str(tokenizer.decode(marker)).strip()}, {"first": tokens // 3}]
        asks.append(Ask(prompt, {"entropy": change, "positions": kinds[i % 3]}, tokens))
    return asks


def bundled(folder: Path) -> Subject:
    """The demonstration model, with its shipped profile and a preset."""
    model, _, profile = demo.load()
    profile = profile.with_preset("calm", Steering(entropy=0.3))
    return Subject(model, profile, DEMO, profile.save(folder / "profile"))


def mixed(subject: Subject, count: int, *, tokens: int = 6, longest: int = 24, seed: int = 0) -> list[Ask]:
    """Requests with all the `steerings` in turn."""
    asked = itertools.cycle(steerings(subject.profile))
    vocabulary = subject.profile.model.tokenizer_size
    return [
        Ask(prompt, steering, tokens)
        for prompt, steering in zip(prompts(count, vocabulary=vocabulary, longest=longest, seed=seed), asked, strict=False)
    ]


def check(differences: Sequence[Difference], asks: Sequence[Ask], completions: int = 1) -> float:
    """All agree, and those steered would not have if they had not been; the largest error."""
    for i, found in enumerate(differences):
        ask = asks[i // completions]
        assert found.error <= TOLERANCE, (ask, found)
        if ask.steering is not None:
            assert found.teeth >= TEETH, (ask, found)
    return max(found.error for found in differences)


@contextlib.contextmanager
def engine(subject: Subject, *, default: Any = None, **options: Any) -> Iterator[Any]:
    """A vLLM engine with `subject`'s profile, in this process unless the options or the environment say otherwise."""
    from vllm import LLM

    # The CPU build's handlers of matrices have finalisers that recurse without end, and leave torch in disorder, if those of an
    # engine before this one run while this one is traced.
    gc.collect()
    settings = {"profile": str(subject.profile_folder)} | ({} if default is None else {"default": default})
    options = {
        "model": str(subject.model_folder),
        "additional_config": {"confsteer": settings},
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "distributed_executor_backend": "uni",
    } | options
    llm = LLM(**options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
