"""Averages over a stream of tokens where neurons are active on different tokens, as in a mixture of experts.

A group is the neurons that are active on the same tokens: all of a dense MLP, those of an expert in a mixture. Each group is
measured on its own tokens, as a layer of its own, so no work is spent on inactive neurons. Activations are averaged over the
tokens that a neuron is active on. Ablation puts that mean in place of the activation.

**Effects are averaged over all tokens.** Where a neuron is not active, ablating it does nothing. This mean is what a dial moves.
It is the paper's mean, with a routing weight of zero elsewhere. It puts neurons of a rare expert and of the shared one on one
scale. So a rare expert's few tokens do not make its neurons look large. A share, such as the part of an effect through the final
norm, is the same either way. A neuron's mean effect over its active tokens is its mean over all tokens, divided by the share of
active ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from confsteer.discovery.streaming import (
    ActivationMoments,
    EffectMeans,
    ExactEffectMeans,
    NeuronEffects,
    ReportedEffects,
    WithError,
)
from confsteer.discovery.token_effects import TokenEffects, TokenSlopes
from confsteer.last_layer.experts import Experts, Part, parts
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram


def groups_of(experts: Experts | None, n_neurons: int) -> list[slice]:
    """List the groups of a layer's neurons, in the order of `parts`."""
    return [slice(0, n_neurons)] if experts is None else experts.groups


def active_groups(experts: Experts, states: TokenStates, groups: Sequence[int]) -> Tensor:
    """Find which of some groups are active on each token, bool ``[tokens, groups]``."""
    assert states.experts is not None
    number = torch.tensor(groups, device=states.experts.device)
    return (states.experts[:, :, None] == number).any(dim=1) | (number >= experts.number)


class GroupMoments:
    """Mean and standard deviation of each neuron's activation over the tokens that it is active on."""

    def __init__(self, experts: Experts | None, n_neurons: int) -> None:
        self._experts = experts
        self._groups = [ActivationMoments(group.stop - group.start) for group in groups_of(experts, n_neurons)]
        self._tokens = torch.tensor(0)

    def update(self, states: TokenStates) -> None:
        """Add tokens, with the activations of all neurons."""
        for moments, part in zip(self._groups, parts(self._experts, states), strict=True):
            moments.update(part.states.activations)
        self._tokens += len(states.targets)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._tokens, *(tensor for moments in self._groups for tensor in moments.sums)

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._tokens = all_reduce(self._tokens)
        for moments in self._groups:
            moments.pool(all_reduce)

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self._tokens)

    @property
    def mean(self) -> Tensor:
        """Float64 ``[n_neurons]``, as the next two."""
        return torch.cat([moments.mean for moments in self._groups])

    @property
    def std(self) -> Tensor:
        """Unbiased."""
        return torch.cat([moments.std for moments in self._groups])

    @property
    def active(self) -> Tensor:
        """Share of the tokens that each neuron is active on."""
        shares = [torch.full_like(moments.mean, moments.count / self.count) for moments in self._groups]
        return torch.cat(shares)


class GroupEffectMeans:
    """Averages of effects over all tokens, also those on which a neuron is not active; see `EffectMeans`."""

    def __init__(self, experts: Experts | None, n_neurons: int) -> None:
        self._groups = [EffectMeans(group.stop - group.start) for group in groups_of(experts, n_neurons)]

    def update(self, group: int, effects: TokenEffects, slopes: TokenSlopes, part: Part, window: Tensor) -> None:
        """Add the tokens of a batch to a group. Every group must be given every batch.

        Args:
            group: its number.
            effects: effects on the tokens that it is active on.
            slopes: slopes on the same tokens.
            part: these tokens.
            window: window of every token of the batch, ``[tokens]``.
        """
        self._groups[group].update(effects, part.states.window, slopes, among=window)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return tuple(tensor for means in self._groups for tensor in means.sums)

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        for means in self._groups:
            means.pool(all_reduce)

    @property
    def count(self) -> int:
        """Tokens."""
        return self._groups[0].count

    def result(self) -> NeuronEffects:
        """The averages of every neuron."""
        return _join([means.result() for means in self._groups])


class GroupExactMeans:
    """Averages of the exact effects of ablating a few neurons, over all tokens; see `ExactEffectMeans`."""

    def __init__(self, experts: Experts | None, readout: Readout, neurons: Tensor, mean: Tensor, unigram: Unigram) -> None:
        """
        Args:
            experts: sizes of a mixture; None for a dense layer.
            readout: the model's last layer, of all neurons.
            neurons: indices of the few, ascending, ``[neurons]``.
            mean: activations that ablation sets neurons to, for all neurons, ``[n_neurons]``.
            unigram: the corpus's unigram distribution.
        """
        self._experts, self._of_group = experts, dict[int, ExactEffectMeans]()
        # Measure the unsteered model on all tokens, without neurons.
        self._unsteered = (
            None if experts is None else ExactEffectMeans(readout.select(neurons[:0]), neurons[:0], mean[:0], unigram)
        )
        for number, group in enumerate(groups_of(experts, readout.n_neurons)):
            own = neurons[(neurons >= group.start) & (neurons < group.stop)] - group.start
            if experts is None or len(own):
                whole = readout if experts is None else readout.select(group)
                self._of_group[number] = ExactEffectMeans(whole, own, mean[group], unigram)
        self._parts: list[Part] = []

    def start(self, states: TokenStates) -> None:
        """Begin a batch, with the activations of all neurons."""
        self._states, self._parts = states, list(parts(self._experts, states))

    def evaluate(self, outputs: FullOutputs, rows: slice) -> None:
        """Evaluate the next tokens of the batch, which are `rows` of it."""
        if self._unsteered is not None:
            self._unsteered.evaluate(outputs, self._states.activations[rows, :0])
        for number, means in self._of_group.items():
            part = self._parts[number]
            if isinstance(part.rows, slice):
                means.evaluate(outputs, part.states.activations[rows])
                continue
            start = min(rows.start, len(self._states.targets))
            first, last = torch.searchsorted(part.rows, torch.tensor([start, rows.stop], device=part.rows.device)).tolist()
            if last > first:
                means.evaluate(outputs.at(part.rows[first:last] - start), part.states.activations[first:last])

    def finish(self) -> None:
        """Add the batch."""
        window = self._states.window
        for number, means in self._of_group.items():
            means.update(self._parts[number].states.window, among=window)
        if self._unsteered is not None:
            self._unsteered.update(window, among=window)
        self._parts = []

    @property
    def _all(self) -> list[ExactEffectMeans]:
        return [*([] if self._unsteered is None else [self._unsteered]), *self._of_group.values()]

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return tuple(tensor for means in self._all for tensor in means.sums)

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        for means in self._all:
            means.pool(all_reduce)

    def result(self) -> ReportedEffects:
        """The averages over all tokens so far."""
        first, *others = (means.result() for means in self._all)
        results = [first, *others]
        uncapped = [one.uncapped for one in results if one.uncapped is not None]
        return first._replace(
            effects=_join([one.effects for one in results]),
            uncapped=_join(uncapped) if uncapped else None,
            argmax_changed=torch.cat([one.argmax_changed for one in results]),
        )


def _join(effects: Sequence[NeuronEffects]) -> NeuronEffects:
    """Put the effects of several groups one after the other."""
    columns = zip(*effects, strict=True)
    return NeuronEffects(*(WithError(*(torch.cat(values) for values in zip(*estimates, strict=True))) for estimates in columns))
