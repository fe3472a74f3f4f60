"""Response curves: how the output changes as a group of neurons is pushed together.

A dial at position ``s`` adds ``s · sign_i · std_i`` to the activation of each of its neurons. Together they act as one neuron
that writes ``Σ sign_i std_i w_i`` and is turned up by ``s``. So the logits at every position have the closed form of
`confsteer.last_layer.readout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from confsteer.discovery.temperature import EntropyMeans
from confsteer.last_layer.cores import Scratch, exponential, on_all_cores
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

POINTS_PER_SIDE = 12
MAX_POSITION = 64.0
MIN_GROWTH = 1.03
"""Least factor by which a dial's effect must grow while its position grows by √2. Below it the curve has flattened."""
MAX_CHANGE = 1.5
"""Change, in nats, at which a curve ends (if it does not turn back before)."""


class ResponseMeans(NamedTuple):
    """Means over tokens at each dial position, float64 ``[positions]``. Entropy, divergences and loss are in nats."""

    position: Tensor
    entropy: Tensor
    kl_model_unigram: Tensor
    """``KL(P_model ‖ P_freq)``"""
    kl_unigram_model: Tensor
    """``KL(P_freq ‖ P_model)``"""
    loss: Tensor
    argmax_changed: Tensor
    """Share of tokens whose most likely next token differs from that at position 0."""
    temperature: Tensor
    """Temperature at which the unsteered model has this mean entropy: see `with_temperature`. NaN where that is out of range, or
    not computed."""


Means = TypeVar("Means", ResponseMeans, EntropyMeans)


class ResponseCurve:
    """Accumulator of `ResponseMeans` over a stream of tokens."""

    def __init__(self, readout: Readout, push: Tensor, unigram: Unigram, positions: Tensor) -> None:
        """
        Args:
            readout: the model's last layer.
            push: amount that position 1 adds to each activation, ``[n_neurons]``. For neurons that are active on different
                tokens it is ``[groups, n_neurons]``, a row per group.
            unigram: the corpus's unigram distribution.
            positions: dial positions, ``[positions]``.
        """
        self.readout, self.unigram = readout.combine(push), unigram
        self.positions = positions.double()
        self._u = self.readout.w_out @ readout.unembedding.T if push.dim() > 1 else self.readout.w_out[0] @ readout.unembedding.T
        self._frequency = unigram.frequency
        self._sums = torch.zeros(5, len(positions), dtype=torch.float64, device=push.device)
        self._count = torch.tensor(0)

    def update(self, outputs: FullOutputs, active: Tensor | None = None) -> None:
        """Add tokens. If there are groups, `active` says which are active on each token, bool ``[tokens, groups]``."""
        readout, u = self.readout, self._u
        if active is not None:
            # Treat the active groups of a token as one neuron of its own.
            readout, u = readout.combine(active.to(u)), (active.to(u) @ u)[:, None]
        delta = self.positions.to(u).expand(len(outputs.targets), -1)
        move = readout.move(outputs.state, delta, paired=active is not None).at(0)
        ids = torch.stack([outputs.targets, outputs.argmax], dim=-1)
        sums = u.new_empty(len(self._QUANTITIES), *delta.shape)
        # Work on a block of tokens and positions by the vocabulary at once.
        tokens = max(1, readout.at_once // (len(self.positions) * readout.vocab_size))
        columns, scratch = max(1, readout.at_once // readout.vocab_size), Scratch(u)

        def measure(first: int) -> None:
            rows = slice(first, first + tokens)
            for at in range(0, len(self.positions), columns):
                here = slice(at, at + columns)
                write, of = move.write[rows, here, None], u if active is None else u[rows]
                y = scratch.empty("y", *write.shape[:2], readout.vocab_size)
                torch.addcmul(outputs.y[rows, None], write, of, out=y)
                # Keep the last direction, the residual: a write after the MLP's norm moves along no other.
                for along, direction in zip(move.along, outputs.x[-len(move.along) :], strict=True):
                    y.addcmul_(along[rows, here, None], direction[rows, None])
                self._measure(readout.cap(y), ids[rows], sums[:, rows, here], scratch.empty("e", *y.shape))

        on_all_cores(measure, range(0, len(delta), tokens), sums.device)
        self._add(*sums)
        self._count += len(delta)

    _QUANTITIES = ("largest", "at_target", "at_top", "z_frequency", "total", "total_z", "total_log_frequency")

    def _measure(self, z: Tensor, ids: Tensor, sums: Tensor, e: Tensor) -> None:
        """Take the sums behind all quantities, from logits ``[tokens, positions, vocab]``. They and `e` are overwritten.

        Small results go to `sums` as they come. Work on them waits until there are many.
        """
        largest, at_ids, z_frequency, total, total_z, total_log_frequency = sums[0], sums[1:3], *sums[3:]
        torch.amax(z, dim=-1, out=largest)
        at_ids.copy_(z.gather(2, ids[:, None].expand(-1, z.shape[1], -1)).movedim(-1, 0))
        z_frequency.copy_(z @ self._frequency)
        exponential(z.sub_(largest[..., None]), out=e)
        total.copy_(e.sum(dim=-1))
        total_log_frequency.copy_(e @ self.unigram.log_frequency)
        total_z.copy_(z.mul_(e).sum(dim=-1))

    def _add(
        self,
        largest: Tensor,
        at_target: Tensor,
        at_top: Tensor,
        z_frequency: Tensor,
        total: Tensor,
        total_z: Tensor,
        total_log_frequency: Tensor,
    ) -> None:
        """Add up the five quantities over tokens ``[tokens, positions]``, from Σe, Σez, … with ``e = exp(z − largest)``."""
        log_z = total.log()
        entropy = log_z - total_z / total
        log_z = log_z + largest
        kl_model_unigram = -entropy - total_log_frequency / total
        kl_unigram_model = log_z - z_frequency + self._frequency @ self.unigram.log_frequency
        quantities = (entropy, kl_model_unigram, kl_unigram_model, log_z - at_target, largest > at_top)
        self._sums += torch.stack([quantity.double().sum(dim=0) for quantity in quantities])

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._sums, self._count

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._sums, self._count = all_reduce(self._sums), all_reduce(self._count)

    def result(self) -> ResponseMeans:
        """Means over all tokens so far, on the CPU."""
        unknown = torch.full_like(self._sums[:1], torch.nan)
        return ResponseMeans(self.positions, *torch.cat([self._sums / int(self._count), unknown]).cpu())


def choose_positions(
    readout: Readout, push: Tensor, unigram: Unigram, states: TokenStates, *, dial: str, active: Tensor | None = None
) -> Tensor:
    """Choose dial positions worth measuring, ascending, with 0 among them, on a sample of tokens.

    On each side positions grow until the dial's quantity has moved by `MAX_CHANGE` nats, flattens out or turns back, or
    the position reaches `MAX_POSITION`. Points are denser near zero.

    Args:
        readout: the model's last layer.
        push: see `ResponseCurve`.
        unigram: the corpus's unigram distribution.
        states: a sample of tokens.
        dial: ``"entropy"`` or ``"unigram"``.
        active: see `ResponseCurve.update`.
    """
    trials = [position for i in range(17) if (position := 0.25 * 2 ** (i / 2)) <= MAX_POSITION]
    curve = ResponseCurve(readout, push, unigram, torch.tensor([0.0, *trials, *(-p for p in trials)]))
    for outputs, rows in FullOutputs.stream(readout, states):
        curve.update(outputs, None if active is None else active[rows])
    moved = dial_change(curve.result(), dial)
    fractions = (torch.arange(1, POINTS_PER_SIDE + 1, dtype=torch.float64) / POINTS_PER_SIDE) ** 1.5
    sides = []
    for sign, start in ((1, 1), (-1, 1 + len(trials))):
        end, previous = trials[0], 0.0
        for position, change in zip(trials, (sign * moved[start : start + len(trials)]).tolist(), strict=True):
            end = position
            if change >= MAX_CHANGE or change <= MIN_GROWTH * previous:
                break
            previous = change
        sides.append(sign * end * fractions)
    return torch.cat([sides[1].flip(0), torch.zeros(1, dtype=torch.float64), sides[0]])


def dial_change(means: ResponseMeans, dial: str) -> Tensor:
    """Measure the effect of each position in the dial's own units, relative to position 0, ``[positions]``.

    ``"entropy"``: change of the mean entropy. ``"unigram"``: how much closer ``KL(P_model ‖ P_freq)`` has come.
    """
    values = means.entropy if dial == "entropy" else -means.kl_model_unigram
    return values - values[means.position.abs().argmin()]


def mean_over_texts(of_texts: Sequence[Means]) -> Means:
    """Average means over texts, which count equally. Their first columns, positions or temperatures, must be equal."""
    at, *_ = of_texts[0]
    _, *columns = zip(*of_texts, strict=True)
    return type(of_texts[0])(at, *(torch.stack(column).mean(dim=0) for column in columns))


def with_temperature(means: ResponseMeans, unsteered: EntropyMeans) -> ResponseMeans:
    """Add the temperature that has the same mean entropy as each position.

    Args:
        means: of a text.
        unsteered: entropies of the unsteered model on the same tokens.
    """
    return means._replace(temperature=unsteered.temperature_of(dial_change(means, "entropy")))


def monotone_range(change: Sequence[float], start: int) -> tuple[int, int]:
    """Find the first and last index of the stretch around `start` over which `change` rises strictly.

    A dial is only turned where more of it means more of its effect.
    """
    low = high = start
    while low > 0 and change[low - 1] < change[low]:
        low -= 1
    while high + 1 < len(change) and change[high + 1] > change[high]:
        high += 1
    return low, high
