"""How exact the series behind a contender's effects is on a real model (`confsteer.discovery.series`), on a profile's neurons.

    python eval/series_error.py MODEL.gguf -p PROFILE --text FILE

Every pair of a token and a neuron that the profile reports is evaluated three times: by the series, by float32 exponentials, and
by the definition in float64, which the errors are measured against.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from torch import Tensor

import confsteer
from confsteer.discovery.exponentials import sum_exponentials
from confsteer.discovery.series import ORDER, TOLERANCE, Series, applies_to
from confsteer.discovery.token_effects import Sums, TokenSlopes
from confsteer.last_layer.cores import Scratch
from confsteer.last_layer.readout import FullOutputs, Move
from confsteer.last_layer.unigram import Unigram
from confsteer.model.dissect import dissect
from confsteer.model.loading import load_model
from confsteer.model.states import Recording, join_batches
from confsteer.text.windows import make_windows

COLUMNS = ("loss", "direct_loss", "entropy", "direct_entropy", "loss_without_frequency")


def by_definition(outputs: FullOutputs, moves: Move, u: Tensor, v: Tensor) -> Tensor:
    """Effects of one neuron in float64, ``[columns, tokens]``. `moves` ``[2, tokens, 1]``, its write `u` ``[vocab]``."""
    z, targets = outputs.y.double(), outputs.targets[:, None]
    total, direct = (
        z + along.double() * outputs.x[0].double() + write.double() * u.double()
        for along, write in zip(moves.along[0], moves.write, strict=True)
    )
    held = total - ((total - z) @ v)[:, None] * v

    def loss(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(1, targets)[:, 0]

    def entropy(logits: Tensor) -> Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    rows = loss(total) - loss(z), loss(direct) - loss(z), entropy(total) - entropy(z), entropy(direct) - entropy(z)
    return torch.stack([*rows, loss(held) - loss(z)])


@click.command()
@click.argument("model")
@click.option("-p", "--profile", required=True, help="Profile whose neurons are evaluated.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True, help="Text to read.")
@click.option("--tokens", default=512, show_default=True, help="Tokens to read.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("series_error.json"), show_default=True)
@torch.no_grad()
def main(model: str, profile: str, text: Path, tokens: int, out: Path) -> None:
    """Compare the effects of PROFILE's neurons in MODEL by the series with those by definition."""
    loaded, found = load_model(model), confsteer.Profile.load(profile)
    neurons = sorted(neuron.index for neuron in (*found.entropy_neurons, *found.frequency_neurons))
    windows = make_windows(confsteer.read_texts([text]), loaded.tokenizer, max_tokens=tokens, source=text.name)
    anatomy = dissect(loaded.model.eval())
    whole = anatomy.readout(len(loaded.tokenizer))
    readout = whole.select(torch.tensor(neurons))
    if not applies_to(readout):
        raise click.UsageError(f"the series does not apply to {model}, which has a norm on its MLP's output or a softcap")
    states = join_batches(list(Recording(loaded.model, anatomy, windows, torch.device("cpu"), readout=whole).read()))
    unigram = Unigram.from_counts(windows.counts(readout.vocab_size))
    activations = states.activations[:, neurons].float()
    delta, u, v = activations.mean(dim=0) - activations, readout.w_out @ readout.unembedding.T, unigram.direction.double()
    series, beyond, errors = Series(readout, u, unigram), [], []
    for outputs, rows in FullOutputs.stream(readout, states):
        moves = readout.move(outputs.state, delta[rows])
        by_series, by_exponentials = (Sums.empty(delta[rows], len(moves.write)) for _ in range(2))
        slopes = TokenSlopes.empty(delta[rows])
        good = series.sum(outputs, moves, by_series, slopes)
        sum_exponentials(readout, outputs, u, unigram, moves, by_exponentials, slopes, Scratch(u))
        each = range(len(neurons))
        exact = torch.stack([by_definition(outputs, moves.at(slice(None), slice(None), [i]), u[i], v) for i in each], dim=-1)
        of_both = (sums.effects(unigram.direction[outputs.targets, None]) for sums in (by_series, by_exponentials))
        difference = [torch.stack([getattr(effects, name) for name in COLUMNS]).double() - exact for effects in of_both]
        beyond.append(~good)
        errors.append(torch.stack(difference) * good)
    error = torch.cat(errors, dim=2)  # [series or exponentials, columns, tokens, neurons]; zero for pairs beyond the series
    worst, of_means = error.abs().amax(dim=(2, 3)).tolist(), error.mean(dim=2).abs().amax(dim=-1).tolist()
    row = {
        "order": ORDER,
        "tolerance": TOLERANCE,
        "tokens": len(delta),
        "neurons": neurons,
        "pairs beyond the series": round(float(torch.cat(beyond).double().mean()), 4),
        **{
            f"largest error by {name}, nats": {
                column: float(f"{value:.1e}") for column, value in zip(COLUMNS, worst[i], strict=True)
            }
            for i, name in enumerate(("the series", "float32 exponentials"))
        },
        "largest error of a neuron's mean by the series, nats": {
            column: float(f"{value:.1e}") for column, value in zip(COLUMNS, of_means[0], strict=True)
        },
    }
    rows = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**rows, Path(model).name: row}, indent=1) + "\n")
    click.echo(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
