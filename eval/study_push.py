"""A constant push against one in proportion to the token's own residual norm: which dial carries over better from text to text?

    python eval/study_push.py MODEL PROFILE --text docs=docs.json --text wiki=wiki.txt ...

A dial adds the same to its neurons at every token. The final norm divides by the residual's scale, so that the same push does
less where the scale is large. For both kinds of push, the position is found at which the mean change of entropy over all texts is
the one asked for. The spread over texts, of the change and of the temperature that does as much, tells which is the better dial.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import confsteer
from confsteer.discovery.response import monotone_range
from confsteer.last_layer.readout import Readout, ReadoutState
from confsteer.model.dissect import dissect
from confsteer.model.loading import load_model
from confsteer.model.states import Recording, join_batches
from confsteer.text.windows import make_windows

ASKED = (-0.15, 0.3, 1.0)
"""Changes of the mean entropy over all texts, in nats."""
STEPS = 14
"""Halvings of an interval: of the dial's positions, of temperatures between 1/4 and 4."""
AT_ONCE = 128
"""Tokens whose logits are held."""


def entropy(readout: Readout, state: ReadoutState, push: Tensor | None = None, temperature: float = 1.0) -> float:
    """Mean entropy in nats, with a push ``[tokens]`` of the readout's only neuron or at a temperature."""
    total = 0.0
    for start in range(0, len(state.residual), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        here = state.at(rows)
        residual = here.residual if push is None else readout.residual_after(here, push[rows, None])
        log_p = (readout.logits(residual) / temperature).log_softmax(dim=-1)
        total -= float((log_p.exp() * log_p).sum())
    return total / len(state.residual)


def solve(rises: Any, target: float, low: float, high: float) -> float:
    """Find where a rising function reaches `target`, by halving."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < target else (low, middle)
    return (low + high) / 2


def study(
    readout: Readout, states: dict[str, ReadoutState], scales: dict[str, Tensor], asked: float, reach: tuple[float, float]
) -> dict[str, Any]:
    """Each text's change of entropy, and the temperature of as much, where all texts' mean change is `asked`.

    Args:
        readout: of one imaginary neuron, which stands for the dial.
        states: of each text.
        scales: factor on the push at each token of each text.
        asked: in nats.
        reach: positions between which the dial rises.
    """
    unsteered = {name: entropy(readout, state) for name, state in states.items()}

    def changes(position: float) -> dict[str, float]:
        return {name: entropy(readout, state, position * scales[name]) - unsteered[name] for name, state in states.items()}

    position = solve(lambda at: sum(changes(at).values()) / len(states), asked, *reach)
    change = changes(position)
    temperature = {
        name: solve(lambda t, s=state, n=name: entropy(readout, s, temperature=t) - unsteered[n], change[name], 0.25, 4)
        for name, state in states.items()
    }
    spread = {key: max(of.values()) - min(of.values()) for key, of in (("change", change), ("temperature", temperature))}
    return {"asked": asked, "position": position, "change": change, "temperature": temperature, "spread": spread}


@click.command()
@click.argument("model")
@click.argument("profile")
@click.option("--text", "texts", multiple=True, required=True, help="NAME=FILE, several.")
@click.option("--tokens", default=2000, show_default=True, help="Tokens of each text.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the results.")
@torch.no_grad()
def main(model: str, profile: str, texts: tuple[str, ...], tokens: int, out: Path | None) -> None:
    """Compare the entropy dial of PROFILE, of MODEL, with one in proportion to the residual's scale."""
    loaded, known = load_model(model), confsteer.Profile.load(profile)
    anatomy = dissect(loaded.model)
    known.check_model(anatomy)
    whole = anatomy.readout(known.model.tokenizer_size)
    push = torch.zeros(whole.n_neurons)
    for neuron in known.entropy_neurons:
        push[neuron.index] = neuron.sign * neuron.std_activation
    readout, states = whole.combine(push), {}
    for name, _, file in (text.partition("=") for text in texts):
        windows = make_windows(confsteer.read_texts([Path(file)]), loaded.tokenizer, max_tokens=tokens, source=name)
        read = join_batches(list(Recording(loaded.model, anatomy, windows, whole.unembedding.device).read()))
        states[name] = readout.state(read.residual, read.mlp_output)
    mean = sum(float(state.sigma.mean()) for state in states.values()) / len(states)
    kinds = {
        "constant": {name: torch.ones_like(state.sigma[:, 0]) for name, state in states.items()},
        "proportional": {name: state.sigma[:, 0] / mean for name, state in states.items()},
    }
    response = known.response["entropy"]
    low, high = monotone_range(response.change("entropy"), response.zero)
    reach = response.position[low], response.position[high]
    rows = [{"push": kind} | study(readout, states, scales, asked, reach) for asked in ASKED for kind, scales in kinds.items()]
    for row in rows:
        changes = ", ".join(f"{name} {value:+.3f}" for name, value in row["change"].items())
        click.echo(
            f"{row['asked']:+.2f} {row['push']:12s} {changes}; spread {row['spread']['change']:.3f} nats, "
            f"{row['spread']['temperature']:.4f} of the temperature"
        )
    if out is not None:
        result = {"model": known.model.id, "tokens": {name: len(state.residual) for name, state in states.items()}, "rows": rows}
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
