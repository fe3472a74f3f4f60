"""Entropy neurons ablated one after another, against random neurons (Stolfo et al. 2024, arXiv 2406.16254).

Ablation sets neurons to their means. This is an edit of the last layer. So one forward pass and the closed form of the
readout give the result for every set of neurons. That includes neurons that a profile does not name, which steering does not
reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from confsteer.bars import progress_bar
from confsteer.defaults import CUMULATIVE_REPEATS, SEED
from confsteer.errors import SettingError
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.states import TokenStates
from confsteer.model.dissect import dissect
from confsteer.model.states import Recording
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import Change, Interval, ratio_interval
from confsteer.results.result import Result
from confsteer.text.windows import Windows, check_context

CANDIDATES = 10
"""Number of neurons nearest in norm from which a control is drawn."""


class Controls(Result):
    """Random neurons in place of entropy neurons: the mean over draws, and the lowest and the highest draw, in nats."""

    mean_norm: float
    """Mean norm of the writes, over neurons and draws."""
    entropy: Interval
    entropy_abs: Interval
    loss: Interval
    loss_abs: Interval


class CumulativeStep(Result):
    """The strongest entropy neurons set to their means together."""

    neurons: tuple[int, ...]
    mean_norm: float
    """Mean norm of their writes."""
    entropy: Change
    """Change of the mean entropy."""
    entropy_abs: Interval
    """Mean |Δentropy| of a token, in nats."""
    loss: Change
    loss_abs: Interval
    """Mean |Δloss| of a token, in nats."""
    controls: Controls


class CumulativeStudy(Result):
    """Ablation of 1, 2, … entropy neurons together and of as many random ones."""

    model: str
    source: str
    tokens: int
    """Number of tokens scored."""
    windows: int
    """Number of windows with these tokens. Windows are the unit of the bootstrap."""
    seed: int
    entropy: Interval
    """Mean of the unsteered model, in nats."""
    loss: Interval
    draws: tuple[tuple[int, ...], ...]
    """Each draw of control neurons, in the order of the entropy neurons that they replace."""
    steps: tuple[CumulativeStep, ...]


def cumulative(
    model: PreTrainedModel,
    windows: Windows,
    profile: Profile,
    *,
    k: int | None = None,
    repeats: int = CUMULATIVE_REPEATS,
    seed: int = SEED,
    progress: bool = False,
) -> CumulativeStudy:
    """Set the 1, 2, … `k` strongest entropy neurons to their means together, and as many random neurons of similar norm.

    Args:
        model: the profile's model. It is put in evaluation mode.
        windows: the text.
        profile: profile with the order of the neurons, and norms and mean activations of all.
        k: most neurons to ablate; all of the profile's if None.
        repeats: number of draws of random neurons.
        seed: seed of the draws.
        progress: whether to show a progress bar.

    Raises:
        NoNeuronsError: the profile has no entropy neurons.
        SettingError: `k` or `repeats` is out of range, or the windows are longer than the model's context.
        ProfileMismatchError, UnsupportedModelError: see `confsteer.steer`.
    """
    found = profile.found("entropy")
    k = len(found) if k is None else k
    if not 1 <= k <= len(found):
        raise SettingError(f"k={k}: the profile has {len(found)} entropy neurons; use 1 to {len(found)}")
    if repeats < 1:
        raise SettingError(f"{repeats} draws of random neurons: use at least 1")
    check_context(windows.window, model.config)
    model.eval()
    anatomy = dissect(model)
    anatomy.require_dense("the cumulative study")
    profile.check_model(anatomy)
    # List the order of ablation, and draws of random neurons of similar norm.
    neurons = found[:k]
    norm, rng = profile.columns["norm"].numpy(), np.random.default_rng(seed)
    draws = [draw_controls(norm, neurons, rng, excluding={*found}) for _ in range(repeats)]

    # Run the model once: the closed form gives the result for every set of neurons.
    with torch.no_grad():
        readout = anatomy.readout(profile.model.tokenizer_size)
        recording = Recording(model, anatomy, windows, readout.unembedding.device, readout=readout)
        mean = profile.columns["mean_activation"].to(readout.unembedding.device).float()
        sums = _measure(recording, readout, mean, [neurons, *draws], show=progress)
    return CumulativeStudy(
        model=profile.model.id,
        source=windows.source,
        tokens=int(sums.n.sum()),
        windows=len(sums.n),
        seed=seed,
        entropy=ratio_interval(sums.entropy, sums.n),
        loss=ratio_interval(sums.loss, sums.n),
        draws=tuple(tuple(draw) for draw in draws),
        steps=tuple(_step(sums, norm, neurons[: n + 1], [draw[: n + 1] for draw in draws]) for n in range(k)),
    )


class _Sums(NamedTuple):
    """Sums over the tokens of each window, float64. Windows without a token that counts are left out."""

    n: Tensor
    """Tokens, ``[windows]``."""
    entropy: Tensor
    """Entropy of the unsteered model, ``[windows]``, as is the next."""
    loss: Tensor
    changes: Tensor
    """Δentropy, |Δentropy|, Δloss and |Δloss| with 1, 2, … neurons of each order ablated, ``[orders, k, 4, windows]``."""


def _measure(recording: Recording, readout: Readout, mean: Tensor, orders: Sequence[Sequence[int]], *, show: bool) -> _Sums:
    """Ablate the first 1, 2, … neurons of each order at every token."""
    tokens = recording.windows.n_tokens
    unsteered, changes = [], []
    with progress_bar("ablate", tokens, show=show) as bar:
        for batch in recording.read(bar.update):
            # Leave out windows without a kept token.
            present, index = batch.window.unique(return_inverse=True)

            def per_window(values: Tensor, index: Tensor = index, n_windows: int = len(present)) -> Tensor:
                return torch.bincount(index, weights=values.double(), minlength=n_windows).cpu()

            before = TokenScores.of_residual(readout, batch.residual, batch.targets)
            unsteered.append(torch.stack([per_window(v) for v in (torch.ones_like(before.nll), before.entropy, before.nll)]))
            rows = []
            for order in orders:
                for after in _ablated(readout, batch, mean, order):
                    entropy, loss = after.entropy - before.entropy, after.nll - before.nll
                    rows.append(torch.stack([per_window(v) for v in (entropy, entropy.abs(), loss, loss.abs())]))
            changes.append(torch.stack(rows).view(len(orders), len(orders[0]), 4, -1))
    n, entropy_before, loss_before = torch.cat(unsteered, dim=-1)
    return _Sums(n, entropy_before, loss_before, torch.cat(changes, dim=-1))


def _ablated(readout: Readout, batch: TokenStates, mean: Tensor, order: Sequence[int]) -> Iterator[TokenScores]:
    """Score the tokens with the first 1, 2, … neurons of `order` at their means."""
    few = readout.select(torch.tensor(order, device=batch.residual.device))
    state = few.state(batch.residual, batch.mlp_output)
    delta = mean[order] - batch.activations[:, order].float()
    for n_ablated in range(1, len(order) + 1):
        change = delta.clone()
        change[:, n_ablated:] = 0
        yield TokenScores.of_residual(readout, few.residual_after(state, change), batch.targets)


def _step(sums: _Sums, norm: np.ndarray, neurons: Sequence[int], draws: Sequence[Sequence[int]]) -> CumulativeStep:
    """Report the effect of ablating `neurons` together, beside as many random ones."""
    at = len(neurons) - 1
    entropy, entropy_abs, loss, loss_abs = sums.changes[0, at]
    return CumulativeStep(
        neurons=tuple(neurons),
        mean_norm=float(norm[neurons].mean()),
        entropy=Change.of(entropy, sums.entropy, sums.n),
        entropy_abs=ratio_interval(entropy_abs, sums.n),
        loss=Change.of(loss, sums.loss, sums.n),
        loss_abs=ratio_interval(loss_abs, sums.n),
        controls=_controls(sums.changes[1:, at].sum(dim=-1) / sums.n.sum(), norm[draws]),
    )


def draw_controls(norm: np.ndarray, neurons: Sequence[int], rng: np.random.Generator, *, excluding: set[int]) -> list[int]:
    """Draw a different random neuron for each of `neurons`, out of the `CANDIDATES` nearest in norm.

    Args:
        norm: norm of every neuron of the layer, ``[n_neurons]``.
        neurons: neurons to find controls for.
        rng: random generator.
        excluding: neurons that must not be controls.

    Raises:
        SettingError: the layer does not have enough others.
    """
    free = [index for index in range(len(norm)) if index not in excluding]
    if len(free) < len(neurons):
        raise SettingError(f"{len(neurons)} controls are needed; the layer has {len(free)} neurons besides its entropy neurons")
    drawn: list[int] = []
    for neuron in neurons:
        nearest = sorted(free, key=lambda index: abs(norm[index] - norm[neuron]))[:CANDIDATES]
        drawn.append(int(rng.choice(nearest)))
        free.remove(drawn[-1])
    return drawn


def _controls(means: Tensor, norms: np.ndarray) -> Controls:
    """Make them from means per draw ``[draws, 4]`` and the norms of its neurons ``[draws, neurons]``."""
    entropy, entropy_abs, loss, loss_abs = (
        Interval(float(column.mean()), float(column.min()), float(column.max())) for column in means.T
    )
    return Controls(mean_norm=float(norms.mean()), entropy=entropy, entropy_abs=entropy_abs, loss=loss, loss_abs=loss_abs)
