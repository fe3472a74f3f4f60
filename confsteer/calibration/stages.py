"""The stages of a calibration: each reads the texts once and returns one result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.calibration.passes import Passes
from confsteer.discovery.effects import ablation_effects
from confsteer.discovery.frequency import chance_frequency_cosine, frequency_cosine
from confsteer.discovery.groups import GroupEffectMeans, GroupExactMeans, GroupMoments, active_groups, groups_of
from confsteer.discovery.moments import tokens_at_once
from confsteer.discovery.null_direction import NullDirection, measure_along, written_before_norm
from confsteer.discovery.response import ResponseCurve, ResponseMeans, choose_positions, mean_over_texts, with_temperature
from confsteer.discovery.select import Chosen, contenders, entropy_neurons, select_neurons
from confsteer.discovery.streaming import NeuronEffects, ReportedEffects
from confsteer.discovery.temperature import EntropyByTemperature, EntropyMeans
from confsteer.discovery.weights import WeightStatistics, unembedding_spectrum, weight_statistics, with_null_dims
from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.experts import Experts, parts
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.states import TokenStates, join_rows
from confsteer.last_layer.unigram import Unigram
from confsteer.profile.schema import ModelIdentity
from confsteer.steering import DIALS, Dial

SAMPLE_TOKENS = 2048
"""Approximate number of tokens in each text's sample, spread evenly. It tells the dials' responses.

A dial's response differs by tens of percent between texts. SmolLM2's ends of the dial differ by 1 % between samples of 2,048 and
4,096 tokens.
"""
EFFECT_TOKENS = 1024
"""Approximate number of the sample's tokens, a text, on which all neurons are measured. Those that could be selected by them are
then measured on all tokens."""
POSITION_SAMPLE = 256
"""Tokens of each text on which the range of each response curve is found. By 64, ranges differed by a factor of √2."""
DIRECTION_SAMPLE = 1024
"""The same for a null direction and its sign. The entropy may be nearly flat along it, and few tokens give the wrong sign."""


class FoldedLayer(NamedTuple):
    """The last layer as tensors, with the statistics of its weights and of the token counts."""

    readout: Readout
    experts: Experts | None
    """Sizes of a mixture of experts. None for a dense layer."""
    weights: WeightStatistics
    unigram: Unigram
    cosine: Tensor
    """Cosine of each neuron's write to the logits with the unigram direction, float64 ``[n_neurons]``."""
    chance_cosine: float
    """Cosine that the largest of as many random directions exceeds 1 time in 20."""

    @property
    def device(self) -> torch.device:
        return self.readout.unembedding.device

    @property
    def groups(self) -> list[slice]:
        """Neurons that are active on the same tokens."""
        return groups_of(self.experts, self.readout.n_neurons)

    @property
    def at_once(self) -> int:
        """Best number of tokens to work on at once."""
        return tokens_at_once(max(group.stop - group.start for group in self.groups))


class Sample(NamedTuple):
    """Every neuron of the layer, measured on the sample."""

    effects: NeuronEffects
    tokens: int
    """Number of tokens that they were measured on."""


class Contenders(NamedTuple):
    """The neurons that the sample leaves in question, measured exactly on all tokens."""

    neurons: list[int]
    measured: ReportedEffects
    """Their exact effects, in the order of `neurons`."""
    tokens: int
    """Number of tokens that they were measured on: all."""


def fold_layer(
    readout: Readout,
    experts: Experts | None,
    counts: Tensor,
    *,
    weights: WeightStatistics | None,
    null_dims: int | None,
    seed: int,
) -> FoldedLayer:
    """Compute what is known before any text is read.

    Args:
        readout: the model's last layer.
        experts: sizes of a mixture of experts; None for a dense layer.
        counts: how often each token occurs, int64 ``[tokenizer_size]``.
        weights: statistics that are known already; computed if None.
        null_dims: directions counted as the null space; found from the spectrum if None.
        seed: seed of the random directions behind the chance levels.
    """
    unigram = Unigram.from_counts(counts.to(readout.unembedding.device))
    if weights is None:
        weights = weight_statistics(readout, null_dims=null_dims, seed=seed)
    cosine = frequency_cosine(readout, unigram)
    return FoldedLayer(readout, experts, weights, unigram, cosine, chance_frequency_cosine(readout, unigram, seed=seed))


def measure_activations(passes: Passes, layer: FoldedLayer, identity: ModelIdentity) -> GroupMoments:
    """Measure the mean and the standard deviation of every neuron's activation.

    Raises:
        UnsupportedModelError: activations are not finite.
    """
    moments = GroupMoments(layer.experts, layer.readout.n_neurons)
    for batch, _ in passes.over("activations", moments, label="1/4 activations"):
        moments.update(batch)
    if not (moments.mean.isfinite().all() and moments.std.isfinite().all()):
        raise UnsupportedModelError(
            f"the activations of {identity.id} are not finite on this text: its weights are damaged, or too large for "
            f"{identity.dtype} (--dtype float32)"
        )
    return moments


def measure_sample(passes: Passes, layer: FoldedLayer, moments: GroupMoments) -> Sample:
    """Measure the effect of setting each neuron of the layer to its mean, on the sample."""
    mean, means = moments.mean.to(layer.device), GroupEffectMeans(layer.experts, layer.readout.n_neurons)
    stride = max(1, round(passes.sample_tokens / (EFFECT_TOKENS * passes.texts)))
    at_least = layer.at_once * stride
    for batch, move_to in passes.over("effects", means, label="2/4 all neurons", at_least=at_least, sample=True):
        batch = batch.at(torch.arange(0, len(batch.targets), stride, device=layer.device))
        for number, part in enumerate(parts(layer.experts, batch)):

            def done(share: float, number: int = number, move_to: Callable[[float], None] = move_to) -> None:
                move_to((number + share) / len(layer.groups))

            readout = layer.readout if layer.experts is None else layer.readout.select(part.neurons)
            measured = ablation_effects(readout, part.states, mean[part.neurons], layer.unigram, on_progress=done)
            means.update(number, *measured, part, batch.window)
    return Sample(means.result(), means.count)


def measure_contenders(passes: Passes, layer: FoldedLayer, moments: GroupMoments, sample: NeuronEffects) -> Contenders:
    """Measure exactly, on all tokens, the neurons that could be selected and the unsteered model."""
    readout, device = layer.readout, layer.device
    neurons = contenders(layer.weights, sample, layer.cosine, layer.chance_cosine)
    indices = torch.tensor(neurons, dtype=torch.long, device=device)
    effects = GroupExactMeans(layer.experts, readout, indices, moments.mean.to(device), layer.unigram)
    for batch, move_to in passes.over("contenders", effects, label="3/4 contenders"):
        effects.start(batch)
        for outputs, rows in FullOutputs.stream(readout, batch):
            effects.evaluate(outputs, rows)
            move_to(rows.stop / len(batch.targets))
        effects.finish()
    return Contenders(neurons, effects.result(), moments.count)


def choose_neurons(layer: FoldedLayer, effects: NeuronEffects, among: list[int]) -> dict[Dial, Chosen]:
    """Choose the neurons on each dial. A dial may have none."""
    selection = select_neurons(layer.weights, effects, layer.cosine, layer.chance_cosine, among=among)
    return {"entropy": selection.entropy, "unigram": selection.unigram}


def other_null_spaces(layer: FoldedLayer, effects: NeuronEffects, *, seed: int) -> dict[int, list[int]]:
    """Find the entropy neurons with half and with twice as many directions counted as the null space, by that number."""
    k, most = layer.weights.null_dims, len(layer.weights.singular_values) - 1
    sizes = sorted({max(1, k // 2), min(2 * k, most)} - {k})
    return {
        weights.null_dims: entropy_neurons(weights, effects)
        for weights in with_null_dims(layer.readout, layer.weights, sizes, seed=seed)
    }


class Responses(NamedTuple):
    """Effects of each dial that has neurons."""

    pooled: dict[Dial, ResponseMeans]
    """Mean responses over the texts, which count equally."""
    by_text: list[dict[Dial, ResponseMeans]]
    """The same dials at the same positions on each text. Empty if no dial has neurons."""


def find_null_direction(passes: Passes, layer: FoldedLayer) -> NullDirection:
    """Find the direction that the unembedding reads least, and measure the residual along it on a part of the sample."""
    spectrum = unembedding_spectrum(layer.readout)
    vector = spectrum.directions[:, 0].float()

    def decide(firsts: list[TokenStates]) -> Tensor:
        return measure_along(layer.readout, vector, _few_of_each(firsts, DIRECTION_SAMPLE), layer.unigram)

    at_least = max(layer.at_once, DIRECTION_SAMPLE)
    sign, norm, along = passes.decide_once("null direction", decide, at_least=at_least).tolist()
    return NullDirection(sign * vector, float(spectrum.singular_values[0]), norm, sign * along)


def measure_responses(
    passes: Passes, layer: FoldedLayer, chosen: dict[Dial, Chosen], moments: GroupMoments, direction: NullDirection | None
) -> Responses:
    """Measure the response of the output to each dial, and the temperature that equals it, on each text's sample.

    Args:
        passes: passes over the texts.
        layer: the last layer.
        chosen: neurons on each dial. A dial without neurons that have a sign is not measured.
        moments: moments of the activations.
        direction: direction that the entropy dial turns in place of neurons; None for neurons.
    """
    pushes = {dial: _Push.of(layer, chosen[dial], moments) for dial in DIALS if chosen[dial].sign[chosen[dial].neurons].any()}
    if direction is not None:
        pushes = {**pushes, "entropy": _Push.along(layer, direction)}
    if not pushes:
        return Responses({}, [])
    positions = _choose_positions(passes, layer, pushes)
    curves: list[dict[Dial, ResponseMeans]] = []
    unsteered: list[EntropyMeans] = []
    for text in range(passes.texts):
        of_dials = {
            dial: ResponseCurve(push.readout, push.added, layer.unigram, positions[dial]) for dial, push in pushes.items()
        }
        entropies = EntropyByTemperature(layer.readout)
        name = f"responses of text {text + 1}" if passes.texts > 1 else "responses"
        every: tuple[ResponseCurve | EntropyByTemperature, ...] = (*of_dials.values(), entropies)
        for batch, move_to in passes.over(name, *every, label="4/4 responses", at_least=layer.at_once, sample=True, text=text):
            active = {dial: push.active(layer, batch) for dial, push in pushes.items()}
            for outputs, rows in FullOutputs.stream(layer.readout, batch):
                for dial, curve in of_dials.items():
                    groups = active[dial]
                    curve.update(outputs, None if groups is None else groups[rows])
                entropies.update(outputs)
                move_to(rows.stop / len(batch.targets))
        curves.append({dial: curve.result() for dial, curve in of_dials.items()})
        unsteered.append(entropies.result())
    return _with_temperatures(curves, unsteered)


class _Push(NamedTuple):
    """Position 1 of a dial: a signed standard deviation of each of its neurons, or a constant along a null direction."""

    readout: Readout
    """The readout of the neurons that are pushed. A direction is an imaginary neuron."""
    added: Tensor
    """Change of each activation, float32 ``[n_neurons]``. In a mixture ``[groups, n_neurons]``, a row per group."""
    groups: list[int]
    """Numbers of the groups of neurons, if they are active on different tokens. Empty if all are active together."""
    sample: int = POSITION_SAMPLE
    """Tokens of each text on which its positions are chosen."""

    @classmethod
    def of(cls, layer: FoldedLayer, chosen: Chosen, moments: GroupMoments) -> _Push:
        """Make the push of the neurons on a dial."""
        on_dial = torch.zeros_like(moments.std)
        on_dial[chosen.neurons] = 1
        added = (chosen.sign * moments.std * on_dial).float().to(layer.device)
        if layer.experts is None:
            return cls(layer.readout, added, [])
        groups = [number for number, group in enumerate(layer.groups) if added[group].any()]
        rows = torch.zeros(len(groups), len(added), device=layer.device)
        for row, number in zip(rows, groups, strict=True):
            row[layer.groups[number]] = added[layer.groups[number]]
        return cls(layer.readout, rows, groups)

    @classmethod
    def along(cls, layer: FoldedLayer, direction: NullDirection) -> _Push:
        """Make the push along a direction."""
        push = torch.tensor([direction.push], dtype=torch.float32, device=layer.device)
        return cls(written_before_norm(layer.readout, direction.vector), push, [], DIRECTION_SAMPLE)

    def active(self, layer: FoldedLayer, states: TokenStates) -> Tensor | None:
        """Find which groups are active on each token, bool ``[tokens, groups]``. None if all are active together."""
        return active_groups(layer.experts, states, self.groups) if layer.experts and self.groups else None


def _choose_positions(passes: Passes, layer: FoldedLayer, pushes: dict[Dial, _Push]) -> dict[Dial, Tensor]:
    """Choose the positions of each dial on a few tokens of each text."""

    def decide(firsts: list[TokenStates]) -> Tensor:
        positions = []
        for dial, push in pushes.items():
            few = _few_of_each(firsts, push.sample)
            active = push.active(layer, few)
            positions.append(choose_positions(push.readout, push.added, layer.unigram, few, dial=dial, active=active))
        return torch.stack(positions)

    at_least = max(layer.at_once, *(push.sample for push in pushes.values()))
    return dict(zip(pushes, passes.decide_once("positions", decide, at_least=at_least), strict=True))


def _few_of_each(firsts: list[TokenStates], tokens: int) -> TokenStates:
    """Take about as many tokens of each text, evenly spread."""
    return join_rows([first.at(slice(None, None, max(1, len(first.targets) // tokens))) for first in firsts])


def _with_temperatures(curves: list[dict[Dial, ResponseMeans]], unsteered: list[EntropyMeans]) -> Responses:
    """Average the curves of the texts, and give each the temperatures that equal it."""
    pooled = {dial: mean_over_texts([one[dial] for one in curves]) for dial in curves[0]}
    entropies = mean_over_texts(unsteered)
    return Responses(
        {dial: with_temperature(curve, entropies) for dial, curve in pooled.items()},
        [{dial: with_temperature(curve, own) for dial, curve in one.items()} for one, own in zip(curves, unsteered, strict=True)],
    )
