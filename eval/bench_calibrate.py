"""What `confsteer calibrate` costs, and what it would cost by the definition of the effects.

Models are random, in shapes from the bundled model's to GPT-2 small's and beyond, with logits of a language model's spread,
neurons of very different strength, and a few planted entropy and token-frequency neurons so that every stage has work.

    python eval/bench_calibrate.py            # everything, about half an hour on 2 cores; writes bench_calibrate.json
    python eval/bench_calibrate.py --only gpt2-small
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from confsteer.discovery.effects import PAIRS_ABOVE, ablation_effects
from confsteer.discovery.exact import ExactAblation
from confsteer.discovery.token_effects import TokenEffects
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram
from confsteer.model.dissect import dissect
from confsteer.model.states import Recording, join_batches
from confsteer.text.windows import make_windows


class Shape(NamedTuple):
    """A GPT-2 of some size, and the text it is calibrated on."""

    layers: int = 12
    d_model: int = 768
    neurons: int = 3072
    vocab: int = 50_257
    tokens: int = 2_560

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, d {self.d_model}, {self.neurons} neurons, vocabulary {self.vocab:,}, {self.tokens:,} tokens"
        )


GPT2_SMALL = Shape()
SHAPES = {
    "demonstration model": Shape(4, 192, 768, 4_096, 2_560),
    "half of GPT-2 small": Shape(6, 384, 1_536, 25_000, 2_560),
    "gpt2-small": GPT2_SMALL,
    "gpt2-small, 10x tokens": GPT2_SMALL._replace(tokens=25_600),
    "gpt2-small, 4x neurons": GPT2_SMALL._replace(neurons=12_288),
    "gpt2-small, 256k vocabulary": GPT2_SMALL._replace(vocab=256_000),
}
NULL_DIMS = 12
PLANTED = 8
"""Neurons of each kind."""


def build(shape: Shape, folder: Path) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, str]:
    """A model and its tokenizer, saved to `folder`, and a text of words with Zipf's frequencies."""
    torch.manual_seed(0)
    heads = max(1, shape.d_model // 64)
    config = GPT2Config(
        vocab_size=shape.vocab, n_layer=shape.layers, n_embd=shape.d_model, n_inner=shape.neurons, n_head=heads, n_positions=512
    )
    config.bos_token_id = config.eos_token_id = 0
    # Tied random weights would predict the token just read with certainty.
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        mlp = model.transformer.h[-1].mlp
        unembedding, w_out = model.lm_head.weight, mlp.c_proj.weight
        # Neurons that are mostly off and sometimes strongly on, as trained ones are.
        mlp.c_fc.weight.mul_(2.0 / (mlp.c_fc.weight.std() * shape.d_model**0.5))
        mlp.c_fc.bias.fill_(-3.0)
        mlp.c_fc.bias[: 2 * PLANTED] = 0
        # Logits with a standard deviation of 3.5, as trained models of this size have.
        unembedding.mul_(3.5 * shape.d_model**-0.5 / unembedding.std())
        w_out.mul_(torch.randn(shape.neurons, 1).mul(0.7).exp())
        unembedding[:, -NULL_DIMS:] *= 1e-3
        constant = torch.ones(NULL_DIMS)
        constant[::2] = -1
        # Into the null space, on top of a constant that makes the norm feel it.
        scale = w_out.norm(dim=1).mean()
        model.transformer.wpe.weight[:, -NULL_DIMS:] = 0.3 * constant
        w_out[:PLANTED] = 0
        w_out[:PLANTED, -NULL_DIMS:] = (
            3 * scale * constant * torch.tensor([1.0, -1.0]).repeat(PLANTED // 2)[:, None] / NULL_DIMS**0.5
        )
        # A residual dimension that reads out as the unigram direction.
        log_frequency = -torch.arange(1, shape.vocab + 1).double().log()
        unembedding[:, 0] = 0.3 * (log_frequency - log_frequency.mean())
        w_out[PLANTED : 2 * PLANTED] = 0
        w_out[PLANTED : 2 * PLANTED, 0] = scale
    model.save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(shape.vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    tokenizer.save_pretrained(folder)
    ids = torch.multinomial(log_frequency.exp()[1:].float(), shape.tokens, replacement=True) + 1
    return model, tokenizer, " ".join(f"w{i}" for i in ids.tolist())


def command(folder: Path, text: Path, tokens: int, *launcher: str, threads: int | None = None) -> dict[str, Any]:
    """`confsteer calibrate` as a user runs it, start of the interpreter included."""
    arguments = [str(folder), "--text", str(text), "--tokens", str(tokens), "--out", str(folder / "profile")]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    start = time.perf_counter()
    pid = subprocess.Popen(
        [sys.executable, *launcher, "-m", "confsteer", "calibrate", *arguments], stdout=subprocess.DEVNULL, env=environment
    ).pid
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 3):
        raise click.ClickException("confsteer calibrate failed")
    profile = json.loads((folder / "profile" / "profile.json").read_text())
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gb": round(usage.ru_maxrss / 2**20, 2),
        "entropy_neurons": len(profile["entropy_neurons"]),
        "frequency_neurons": len(profile["frequency_neurons"]),
    }


def record(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[Readout, TokenStates, Tensor, Unigram]:
    """What the effects are computed from."""
    anatomy = dissect(model)
    readout = anatomy.readout()
    windows = make_windows([text], tokenizer)
    recording = Recording(model, anatomy, windows, torch.device("cpu"))
    states = join_batches(list(recording.read()))
    return readout, states, states.activations.mean(dim=0), Unigram.from_counts(windows.counts(readout.vocab_size))


def by_the_paper(readout: Readout, states: TokenStates, mean: Tensor, unigram: Unigram, neuron: int) -> TokenEffects:
    """One neuron's effects as the paper's procedure has them, with nothing shared and no closed form, ``[tokens]``.

    Ablate, norm, unembed, measure; again with the norm frozen; again with the logits moved back along the unigram direction.
    In the precision of its arguments.
    """
    W, b, v = readout.unembedding, readout.logit_bias, unigram.direction
    rows: list[list[Tensor]] = []
    for part in torch.arange(len(states.targets)).split(256):
        h, target = states.residual[part], states.targets[part][:, None]
        h = h - h.mean(dim=-1, keepdim=True)
        ablated = h + (mean[neuron] - states.activations[part, neuron])[:, None] * readout.w_out[neuron]

        def sigma(x: Tensor) -> Tensor:
            return (x.square().mean(dim=-1, keepdim=True) + readout.epsilon).sqrt()

        def measure(logits: Tensor, target: Tensor = target) -> tuple[Tensor, Tensor, Tensor]:
            log_p = logits.log_softmax(dim=-1)
            return -log_p.gather(1, target)[:, 0], -(log_p.exp() * log_p).sum(dim=-1), -(log_p @ unigram.log_frequency.exp())

        z = h / sigma(h) @ W.T + b
        total = ablated / sigma(ablated) @ W.T + b
        before, after = measure(z), measure(total)
        direct = measure(ablated / sigma(h) @ W.T + b)
        direct_entropy = direct[1] - before[1]
        held = measure(total - ((total - z) @ v)[:, None] * v)
        rows.append(
            [
                after[0] - before[0],
                direct[0] - before[0],
                after[1] - before[1],
                direct_entropy,
                direct_entropy,  # there is no write norm to freeze
                after[2] - before[2],
                held[0] - before[0],
            ]
        )
    return TokenEffects(*(torch.cat(column) for column in zip(*rows, strict=True)))


def double(readout: Readout, states: TokenStates, mean: Tensor, unigram: Unigram) -> tuple[Any, Any, Any, Any]:
    """The same in float64."""
    wide_unigram = Unigram(unigram.frequency.double(), unigram.log_frequency.double(), unigram.direction.double(), unigram.length)
    wide = Readout(readout.w_out.double(), readout.unembedding.double(), readout.logit_bias.double(), readout.epsilon, True)
    exact_states = states._replace(activations=states.activations.double(), residual=states.residual.double())
    return wide, exact_states, mean.double(), wide_unigram


def compare(shape: Shape, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, text: str, sample: int) -> dict[str, Any]:
    """The effects of every neuron, against the two slow ways on samples; times in seconds."""
    arguments = record(model, tokenizer, text)
    readout, states, mean, unigram = arguments
    with torch.no_grad():
        start = time.perf_counter()
        fast, _ = ablation_effects(*arguments)
        seconds = time.perf_counter() - start
        chosen = torch.randperm(readout.n_neurons, generator=torch.Generator().manual_seed(0))[:sample]
        chosen[:4] = torch.tensor([0, 1, PLANTED, PLANTED + 1])
        start = time.perf_counter()
        slow = [by_the_paper(*arguments, int(neuron)) for neuron in chosen[: max(2, sample // 8)]]
        direct_seconds = (time.perf_counter() - start) / len(slow) * readout.n_neurons
        few = states._replace(activations=states.activations[:, chosen])
        start = time.perf_counter()
        delta, ablation = mean[chosen] - few.activations, ExactAblation(readout.select(chosen), unigram)
        parts = [ablation.effects(out, delta[rows]).effects for out, rows in FullOutputs.stream(readout, few)]
        closed = TokenEffects(*map(torch.cat, zip(*parts, strict=True)))
        closed_seconds = (time.perf_counter() - start) / len(chosen) * readout.n_neurons
        wide = double(*arguments)
        definition = [by_the_paper(*wide, int(neuron)) for neuron in chosen[: len(slow)]]

    def worst(name: str, exact: Tensor, neurons: Tensor) -> float:
        """Largest relative error of a neuron's mean |effect|; errors below 1e-7 nats do not count."""
        ours = getattr(fast, name)[:, neurons].double().abs().mean(dim=0)
        error = (ours - exact.double().abs().mean(dim=0)).abs()
        return float(torch.where(error < 1e-7, 0, error / exact.double().abs().mean(dim=0)).max())

    by_definition = {name: torch.stack([getattr(one, name) for one in definition], dim=1) for name in TokenEffects._fields}
    return {
        "effects_seconds": round(seconds, 2),
        "paper_seconds_extrapolated": round(direct_seconds),
        "paper_neurons_timed": len(slow),
        "closed_form_seconds_extrapolated": round(closed_seconds),
        "closed_form_neurons_timed": len(chosen),
        "ratio_to_paper": round(direct_seconds / seconds),
        "ratio_to_closed_form": round(closed_seconds / seconds, 1),
        "worst_relative_error_to_closed_form": {n: worst(n, getattr(closed, n), chosen) for n in TokenEffects._fields},
        "worst_relative_error_to_paper_in_float64": {n: worst(n, by_definition[n], chosen[: len(slow)]) for n in by_definition},
        "median_total_effect": float(fast.loss.abs().mean(dim=0).median()),
        "largest_total_effect": float(fast.loss.abs().mean(dim=0).max()),
    }


def processes() -> dict[str, Any]:
    """One process against two, each with one thread."""
    shape = SHAPES["half of GPT-2 small"]._replace(tokens=10_240)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, _, text = build(shape, folder)
        file = folder / "text.txt"
        file.write_text(text)
        alone, shared = (command(folder, file, shape.tokens, *launcher, threads=1) for launcher in ((), two))
    seconds = {"one process": alone["seconds"], "two processes": shared["seconds"]}
    return {"shape": str(shape), **seconds, "speed-up": round(alone["seconds"] / shared["seconds"], 2)}


@click.command()
@click.option("--only", type=click.Choice(list(SHAPES)), multiple=True, help="Some of the shapes.  [default: all]")
@click.option(
    "--sample", default=64, show_default=True, help="Neurons evaluated the slow ways; an eighth of them by the paper's."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
def main(only: tuple[str, ...], sample: int, out: Path) -> None:
    """Time and peak memory of `confsteer calibrate` over model sizes, against the definition of the effects."""
    rows: dict[str, Any] = {}
    for name in only or SHAPES:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model, tokenizer, text = build(shape, folder)
            file = folder / "text.txt"
            file.write_text(text)
            rows[name] = {"shape": str(shape), **command(folder, file, shape.tokens)}
            # The slow ways would take too long on the larger shapes, and say nothing new there.
            if shape.tokens * shape.neurons * shape.vocab <= GPT2_SMALL.tokens * GPT2_SMALL.neurons * GPT2_SMALL.vocab:
                rows[name] |= compare(shape, model, tokenizer, text, sample)
        click.echo(f"{name}: {json.dumps(rows[name], indent=1)}")
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "pairs_above": PAIRS_ABOVE,
        "rows": rows,
        "processes": processes(),
    }
    click.echo(json.dumps(result["processes"], indent=1))
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
