"""Train the demonstration model that ships in ``confsteer/demo/``.

A GPT-2-architecture language model of 3.4M parameters on public-domain books. Large models form, over billions of
tokens, directions of the residual stream that the unembedding hardly reads, and a few neurons of the last MLP that
write into them. A model of this size and budget does not. So the *structure* is given here and the *function* is
learned:

- the last ``NULL_DIMS`` input dimensions of the (untied) unembedding are held at zero;
- ``RESERVED`` neurons of the last MLP may write only into those dimensions, with components that sum to zero (the
  final LayerNorm subtracts the mean, which would leak anything else into the other dimensions);
- the other neurons of that layer may not write into them.

What the reserved neurons react to, how strongly and with what sign is left to the ordinary language-modelling loss.
Some training windows hold a stretch that is read twice (natural text, or random tokens): without repetition there is
little for confidence to regulate, and no induction to learn.

    python examples/train_demo_model.py --books BOOKS_DIR --out OUT_DIR
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB, D_MODEL, LAYERS, HEADS, CONTEXT = 4096, 192, 4, 4, 512
NULL_DIMS = 8
RESERVED = 8
POSITION_DIMS = 48
INIT_STD = 0.06
"""About 1/sqrt(D_MODEL): GPT-2's 0.02 is for wider models, and with it attention starts learning late here."""
BATCH = 16
FINAL_SHARE, WARMUP = 0.05, 100


class Phase(NamedTuple):
    """A stretch of the run, with an optimiser of its own."""

    until: int
    """Step it ends at."""
    peak_lr: float
    """Of a cosine over `horizon` steps from the start of the run. Copying is not learned at the rate that suits text."""
    horizon: int
    embedding_share: float
    """Of the learning rate, for embeddings and unembedding."""
    repeated_text: float
    """Share of the windows in which a stretch of text is read twice."""
    repeated_random: float
    """Share of the windows that are random tokens, read again and again."""


# As it was found, by watching the log: mostly text, until it is known; more repetition, until random tokens are copied; then
# more repeated text.
PHASES = (
    Phase(1400, 2e-3, 4200, 0.75, repeated_text=0.15, repeated_random=0.10),
    Phase(1900, 2e-3, 4200, 0.40, repeated_text=0.20, repeated_random=0.30),
    Phase(3500, 1e-3, 4200, 0.75, repeated_text=0.20, repeated_random=0.30),
    Phase(4000, 2e-3, 4700, 0.75, repeated_text=0.20, repeated_random=0.30),
    Phase(4700, 2e-3, 4700, 0.75, repeated_text=0.40, repeated_random=0.12),
)
EOT = "<|endoftext|>"


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``VOCAB`` entries, trained on `files`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train([str(file) for file in files], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> NDArray[np.int64]:
    """One stream of token ids; every book starts with the end-of-text token."""
    ids: list[int] = []
    for file in files:
        ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return np.asarray(ids, dtype=np.int64)


def sample_batch(
    stream: NDArray[np.int64], random_token_cdf: NDArray[np.float64], phase: Phase, rng: np.random.Generator
) -> NDArray[np.int64]:
    """``[BATCH, CONTEXT + 1]`` ids: text, text with a stretch that is read twice, or random tokens read until it is full."""
    starts = rng.integers(0, len(stream) - CONTEXT - 1, size=BATCH)
    windows = np.stack([stream[s : s + CONTEXT + 1] for s in starts])
    for window in windows:
        kind = rng.random()
        # Log-uniform: a short stretch read many times teaches copying, from which long ones teach induction.
        length = int(np.exp(rng.uniform(np.log(8), np.log(CONTEXT // 2))))
        if kind < phase.repeated_random:
            window[:] = np.resize(np.searchsorted(random_token_cdf, rng.random(length), side="right"), len(window))
        elif kind < phase.repeated_random + phase.repeated_text:
            first = int(rng.integers(0, CONTEXT + 2 - 2 * length))
            window[first + length : first + 2 * length] = window[first : first + length]
    return windows


def constrain(model: Any) -> None:
    """Project the weights onto the given structure (module docstring), in place."""
    write = model.transformer.h[-1].mlp.c_proj.weight  # [neurons, d_model]
    with torch.no_grad():
        model.lm_head.weight[:, -NULL_DIMS:] = 0
        write[:-RESERVED, -NULL_DIMS:] = 0
        write[-RESERVED:, :-NULL_DIMS] = 0
        write[-RESERVED:, -NULL_DIMS:] -= write[-RESERVED:, -NULL_DIMS:].mean(dim=1, keepdim=True)


@torch.no_grad()
def start_near_induction(model: Any) -> None:
    """Set the initial weights where induction is a few hundred steps away instead of thousands; all are trained on.

    Positions start as sinusoids in dimensions of their own, where the first head of the first layer starts by looking
    one token back (a shift is a rotation of sinusoids). Heads start as copiers (output weights are the value weights
    transposed) that compare like with like (keys weigh as queries do), and the unembedding starts equal to the
    embeddings, so that copying is near the identity instead of `VOCAB` associations.
    """
    embeddings, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    half, width = POSITION_DIMS // 2, D_MODEL // HEADS
    frequency = math.pi / 2 * (1 / 200) ** (torch.arange(half) / (half - 1))
    angle = torch.arange(CONTEXT)[:, None] * frequency
    embeddings[:, :POSITION_DIMS] = 0
    positions.zero_()
    positions[:, :POSITION_DIMS] = 2 * INIT_STD * torch.cat([angle.sin(), angle.cos()], dim=1)
    model.lm_head.weight.copy_(embeddings)
    for layer, block in enumerate(model.transformer.h):
        query, key, value = block.attn.c_attn.weight.split(D_MODEL, dim=1)
        block.attn.c_proj.weight.copy_(0.5 * value.T)
        if layer > 0:
            key[:, :width] = query[:, :width]
            continue
        cosine, sine = torch.diag(frequency.cos()), torch.diag(frequency.sin())
        rotation = torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])
        query[:, :width] = 0
        key[:, :width] = 0
        query[:POSITION_DIMS, :POSITION_DIMS] = 3 * rotation
        key[:POSITION_DIMS, :POSITION_DIMS] = 3 * torch.eye(POSITION_DIMS)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, stream: NDArray[np.int64], windows: int = 64) -> float:
    """Mean next-token loss in nats over evenly spaced windows of an unseen stream."""
    starts = np.linspace(0, len(stream) - CONTEXT - 1, windows).astype(int)
    losses = [
        model(
            input_ids=torch.from_numpy(stream[s : s + CONTEXT][None]), labels=torch.from_numpy(stream[s : s + CONTEXT][None])
        ).loss
        for s in starts
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def induction_losses(model: GPT2LMHeadModel, stretches: NDArray[np.int64]) -> tuple[float, float]:
    """Mean loss on the first and on the second reading of ``stretches`` ``[n, length]``, in nats."""
    ids = torch.from_numpy(np.concatenate([stretches, stretches], axis=1))
    nll = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    nll = nll.view(len(ids), -1)
    length = stretches.shape[1]
    return float(nll[:, : length - 1].mean()), float(nll[:, length:].mean())


@click.command()
@click.option("--books", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--held-out", multiple=True, default=("pg84.txt", "98-0.txt"), show_default=True, help="Books never trained on.")
@click.option("--seed", default=0, show_default=True)
@click.option("--log-every", default=100, show_default=True)
@click.option("--steps", default=PHASES[-1].until, show_default=True, help="Stop after this many.")
def main(books: Path, out: Path, held_out: tuple[str, ...], seed: int, log_every: int, steps: int) -> None:
    """Train the tokenizer and the model, and write both to OUT with a log of the run."""
    torch.manual_seed(seed)
    files = sorted(books.glob("*.txt"))
    train_files = [file for file in files if file.name not in held_out]
    tokenizer = train_tokenizer(train_files)
    stream = encode(tokenizer, train_files)
    unseen = encode(tokenizer, [file for file in files if file.name in held_out])
    click.echo(f"{len(train_files)} books, {len(stream):,} training tokens, {len(unseen):,} held out")

    counts = np.bincount(stream, minlength=VOCAB)
    counts[tokenizer.eos_token_id] = 0
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "unigram.npy", counts)
    # Random stretches favour common tokens, but visit all of them.
    weight = np.sqrt(np.bincount(stream, minlength=VOCAB) + 1.0)
    random_token_cdf = np.cumsum(weight / weight.sum())
    random_token_cdf[-1] = 1.0

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    start_near_induction(model)
    constrain(model)
    click.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight, model.lm_head.weight]
    known = {id(p) for p in embeddings}
    others = [p for p in model.parameters() if id(p) not in known]

    @torch.compile
    def training_loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    log: list[dict[str, float]] = []
    probe = np.random.default_rng(1)
    natural = np.stack([unseen[s : s + 100] for s in probe.integers(0, len(unseen) - 100, size=32)])
    random_tokens = np.searchsorted(random_token_cdf, probe.random((32, 100)), side="right")
    started = time.perf_counter()
    start = 0
    for phase in PHASES:
        rng = np.random.default_rng([seed, start])
        optimizer = torch.optim.AdamW(
            [
                {"params": embeddings, "share": phase.embedding_share, "weight_decay": 0.1},
                {"params": [p for p in others if p.dim() >= 2], "share": 1.0, "weight_decay": 0.1},
                {"params": [p for p in others if p.dim() < 2], "share": 1.0, "weight_decay": 0.0},
            ],
            lr=phase.peak_lr,
            betas=(0.9, 0.95),
        )
        for step in range(start, min(phase.until, steps)):
            cosine = 0.5 * (1 + math.cos(math.pi * step / phase.horizon))
            warm = min(1.0, (step - start + 1) / WARMUP)
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * warm * phase.peak_lr * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)
            loss = training_loss(torch.from_numpy(sample_batch(stream, random_token_cdf, phase, rng)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            constrain(model)
            if (step + 1) % log_every == 0:
                model.eval()
                first, second = induction_losses(model, natural)
                random_first, random_second = induction_losses(model, random_tokens)
                row = {
                    "step": step + 1,
                    "train_loss": round(loss.item(), 4),
                    "held_out_loss": round(held_out_loss(model, unseen), 4),
                    "natural_first": round(first, 3),
                    "natural_second": round(second, 3),
                    "random_first": round(random_first, 3),
                    "random_second": round(random_second, 3),
                    "seconds": round(time.perf_counter() - started),
                }
                log.append(row)
                click.echo(json.dumps(row))
                model.train()
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
                (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
        start = phase.until


if __name__ == "__main__":
    main()
