"""Real models in vLLM, steered and not, log-probability by log-probability beside transformers.

    python eval/vllm_real.py save MODEL.gguf FOLDER                              # in an environment with gguf
    python eval/vllm_real.py compare FOLDER --profile PROFILE --dtype bfloat16   # in one with vLLM, in a checkout with its tests

``save`` writes the weights of a GGUF file as an ordinary checkpoint in float32. ``compare`` starts vLLM on it, in this process,
sends requests with every kind of steering at once, and adds what it finds to ``vllm_real.json``. Prompts are of the Python
documentation; each request's prompt and answer are scored, the likeliest few tokens of each position. Differences are of
log-probabilities, in nats, to transformers with the same weights in the same precision. The effect of a steering, steered less
unsteered in transformers, says what they are to be held against.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from confsteer import Profile, Steering
from confsteer.model.loading import load_model
from confsteer.profile.schema import library_versions
from confsteer.text.sources import python_docs
from confsteer.text.windows import leading_ids
from tests.runtimes.vllm import parity

RESULTS = Path(__file__).with_suffix(".json")
PROMPT, ANSWER = 32, 8
"""Tokens."""


class Differences(NamedTuple):
    """Absolute differences of log-probabilities, ``[log-probabilities]`` each."""

    error: torch.Tensor
    """vLLM's to transformers'."""
    effect: torch.Tensor
    """Transformers' to the same unsteered."""


@click.group()
def main() -> None:
    """Compare real models in vLLM with transformers."""


@main.command()
@click.argument("file")
@click.argument("folder", type=click.Path(path_type=Path))
def save(file: str, folder: Path) -> None:
    """Write the weights of a GGUF FILE to FOLDER, in float32."""
    model, tokenizer = load_model(file, device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--profile", "profile_name", required=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--compiled", is_flag=True, help="Let vLLM compile the model.")
def compare(folder: Path, profile_name: str, dtype: str, compiled: bool) -> None:
    """Start vLLM on FOLDER and hold it against transformers."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    loaded, profile = load_model(str(folder), device="cpu", dtype=dtype), Profile.load(profile_name)
    neuron = profile.steerable[0]
    calm = Steering(scale={neuron.index: 0.0}, shift={neuron.index: 2 * neuron.std_activation})
    with tempfile.TemporaryDirectory() as place:
        profile = profile.with_preset("calm", calm)
        subject = parity.Subject(loaded.model, profile, folder, profile.save(Path(place) / "profile"))
        asks = requests(loaded.tokenizer, profile)
        with parity.engine(subject, dtype=dtype, enforce_eager=not compiled, max_model_len=128) as llm:
            outputs = parity.ask_all(llm, asks, prompt_logprobs=5, temperature=0.0)
    found = [differences(subject, ask, output) for ask, output in zip(asks, outputs, strict=True)]
    import vllm

    row = {
        "model": profile.model.id,
        "profile": Path(profile_name).name,
        "dtype": dtype,
        "compiled": compiled,
        "requests": len(asks),
        "unsteered": summary([one for ask, one in zip(asks, found, strict=True) if ask.steering is None]),
        "steered": summary([one for ask, one in zip(asks, found, strict=True) if ask.steering is not None]),
        "least effect of a steering": round(
            min(float(one.effect.max()) for ask, one in zip(asks, found, strict=True) if ask.steering is not None), 6
        ),
        "versions": {**library_versions(), "vllm": vllm.__version__},
    }
    click.echo(json.dumps(row, indent=1))
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = ("model", "dtype", "compiled")
    rows = [other for other in rows if any(other[key] != row[key] for key in same)] + [row]
    rows.sort(key=lambda one: [str(one[key]) for key in same])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def requests(tokenizer: Any, profile: Profile) -> list[parity.Ask]:
    """Every kind of steering, and none after every other of them, each of another piece of text."""
    asked = [steering for steering in parity.steerings(profile) if steering is not None]
    start = leading_ids(tokenizer)
    documents = itertools.cycle(python_docs("held-out"))
    prompts = (tokenizer(next(documents)[:1000], add_special_tokens=False)["input_ids"] for _ in itertools.count())
    long = (start + ids[: PROMPT - len(start)] for ids in prompts if len(ids) >= PROMPT)
    steerings = [steering for i, one in enumerate(asked) for steering in ((one, None) if i % 2 else (one,))]
    return [parity.Ask(prompt, steering, ANSWER) for steering, prompt in zip(steerings, long, strict=False)]


def differences(subject: parity.Subject, ask: parity.Ask, output: Any) -> Differences:
    """All log-probabilities that vLLM gave for one request."""
    (completion,) = output.outputs
    text = ask.prompt + list(completion.token_ids)
    rows = dict(enumerate(output.prompt_logprobs or []))
    rows |= {len(ask.prompt) + i: row for i, row in enumerate(completion.logprobs)}
    asked = parity.expected(subject, text, len(ask.prompt), ask.steering).float()
    plain = asked if ask.steering is None else parity.expected(subject, text, len(ask.prompt), None).float()
    seen = [(at - 1, token, value.logprob) for at, row in rows.items() if row for token, value in row.items()]
    positions, tokens, theirs = (torch.tensor(column) for column in zip(*seen, strict=True))
    ours = asked[positions, tokens]
    return Differences((ours - theirs).abs(), (ours - plain[positions, tokens]).abs())


def summary(found: Sequence[Differences]) -> dict[str, float | int]:
    error, effect = torch.cat([one.error for one in found]), torch.cat([one.effect for one in found])
    numbers = {
        "mean error": error.mean(),
        "largest error": error.max(),
        "mean effect": effect.mean(),
        "largest effect": effect.max(),
    }
    return {"log-probabilities": len(error), **{name: float(f"{float(value):.3g}") for name, value in numbers.items()}}


if __name__ == "__main__":
    main()
