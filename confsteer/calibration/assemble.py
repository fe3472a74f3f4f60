"""The profile, made from the stages' measurements."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from confsteer.calibration.stages import Contenders, FoldedLayer, Responses
from confsteer.discovery.groups import GroupMoments
from confsteer.discovery.null_direction import NullDirection
from confsteer.discovery.response import ResponseMeans
from confsteer.discovery.select import Chosen, percentile
from confsteer.discovery.streaming import NeuronEffects, WithError
from confsteer.profile import schema
from confsteer.profile.profile import Profile
from confsteer.profile.schema import (
    CorpusIdentity,
    Layer,
    Measurement,
    ModelIdentity,
    Neuron,
    OtherNullSpace,
    Response,
    library_versions,
)
from confsteer.steering import Dial
from confsteer.text.counts import counts_sha256
from confsteer.text.windows import Windows


class Measurements(NamedTuple):
    """The results of the stages."""

    moments: GroupMoments
    effects: NeuronEffects
    """Effects of every neuron of the layer: on all tokens for the contenders, on the sample for the others."""
    sample_tokens: int
    contenders: Contenders
    chosen: dict[Dial, Chosen]
    other_null_spaces: dict[int, list[int]]
    """Entropy neurons with other numbers of directions counted as the null space."""
    null_direction: NullDirection | None
    """The direction that the entropy dial turns in place of neurons. None if it turns neurons."""
    responses: Responses
    texts: list[str]
    """Names of the texts, in their order."""


def identify_corpus(windows: Windows, counts: Tensor, *, kept_tokens: int) -> CorpusIdentity:
    """Identify the text that the profile depends on (all texts together), and the token counts ``[tokenizer_size]``."""
    return CorpusIdentity(
        source=windows.source,
        sha256=windows.sha256,
        tokens=windows.n_tokens,
        kept_tokens=kept_tokens,
        windows=len(windows),
        window=windows.window,
        unigram_tokens=int(counts.sum()),
        unigram_sha256=counts_sha256(counts),
    )


def assemble_profile(
    identity: ModelIdentity, corpus: CorpusIdentity, layer: FoldedLayer, measured: Measurements, *, seed: int
) -> Profile:
    """Make the profile of a calibrated model.

    Args:
        identity: identity of the model.
        corpus: text that it was calibrated on.
        layer: statistics of its last layer's weights.
        measured: measurements of its last layer.
        seed: of the random directions behind the chance levels.
    """
    weights, moments, effects, contenders = layer.weights, measured.moments, measured.effects, measured.contenders
    direction = measured.null_direction
    statistics = {
        "norm": weights.norm,
        "logit_variance": weights.logit_variance,
        "null_fraction": weights.null_fraction,
        "frequency_cosine": layer.cosine,
        "mean_activation": moments.mean,
        "std_activation": moments.std,
        **({} if identity.experts is None else {"active": moments.active}),
    }
    neurons = {
        dial: tuple(_neuron(identity, i, statistics, chosen.sign, _reported(contenders, i)) for i in chosen.neurons)
        for dial, chosen in measured.chosen.items()
    }
    effect_tokens = torch.full_like(moments.mean, measured.sample_tokens)
    effect_tokens[contenders.neurons] = contenders.tokens
    return Profile.create(
        model=identity,
        corpus=corpus,
        seed=seed,
        versions=library_versions(),
        layer=Layer(
            null_dims=weights.null_dims,
            cliff=weights.cliff,
            other_null_spaces=tuple(
                OtherNullSpace(null_dims=k, entropy_neurons=tuple(neurons)) for k, neurons in measured.other_null_spaces.items()
            ),
            chance_null_fraction=weights.chance_null_fraction,
            chance_frequency_cosine=layer.chance_cosine,
            entropy=contenders.measured.entropy,
            loss=contenders.measured.loss,
        ),
        entropy_neurons=neurons["entropy"],
        frequency_neurons=neurons["unigram"],
        null_direction=direction and _null_direction(direction),
        response=_curves(measured.responses.pooled),
        responses_by_text=_curves_by_text(measured),
        columns={
            **statistics,
            "singular_values": weights.singular_values,
            "effect_tokens": effect_tokens,
            **({} if direction is None else {"null_direction": direction.vector.cpu()}),
            **{name: estimate.value for name, estimate in effects._asdict().items()},
            **{f"{name}_standard_error": estimate.standard_error for name, estimate in effects._asdict().items()},
        },
    )


def _null_direction(found: NullDirection) -> schema.NullDirection:
    return schema.NullDirection(
        singular_value=found.singular_value,
        push=found.push,
        residual_norm=found.residual_norm,
        residual_along=found.residual_along,
    )


class _Reported(NamedTuple):
    """One neuron's row of the exact effects."""

    effects: dict[str, Measurement]
    uncapped: dict[str, Measurement]
    """Effects before the softcap. Empty for a model without one."""
    argmax_changed: float


def _reported(contenders: Contenders, neuron: int) -> _Reported:
    row = contenders.neurons.index(neuron)
    effects, uncapped, argmax_changed, *_ = contenders.measured
    return _Reported(
        effects=_measurements(effects, row),
        uncapped={} if uncapped is None else _measurements(uncapped, row),
        argmax_changed=float(argmax_changed[row]),
    )


def _neuron(model: ModelIdentity, index: int, statistics: dict[str, Tensor], sign: Tensor, reported: _Reported) -> Neuron:
    """Make the record of a neuron of the layer."""
    effects, uncapped = reported.effects, reported.uncapped
    values: dict[str, Any] = {name: float(column[index]) for name, column in statistics.items()}
    return Neuron(
        layer=model.layer,
        index=index,
        name=None if model.experts is None else model.experts.name(index),
        sign=cast(Literal[-1, 0, 1], int(sign[index])),
        **values,
        norm_percentile=float(percentile(statistics["norm"])[index]),
        logit_variance_percentile=float(percentile(statistics["logit_variance"])[index]),
        total_effect=effects["total"],
        direct_effect=effects["direct"],
        mediation=effects["mediation"],
        loss_effect=effects["loss"],
        entropy_effect=effects["entropy"],
        entropy_effect_abs=effects["entropy_abs"],
        entropy_norm=effects["entropy_norm"],
        entropy_write_norm=effects["entropy_write_norm"],
        entropy_straight=effects["entropy_straight"],
        norm_share=effects["norm_share"],
        frequency_effect=effects["frequency"],
        frequency_mediation=effects["frequency_mediation"],
        argmax_changed=reported.argmax_changed,
        total_effect_uncapped=uncapped.get("total"),
        entropy_effect_abs_uncapped=uncapped.get("entropy_abs"),
    )


def _measurements(effects: NeuronEffects, row: int) -> dict[str, Measurement]:
    return {name: _measurement(estimate, row) for name, estimate in effects._asdict().items()}


def _measurement(estimate: WithError, row: int) -> Measurement:
    error = float(estimate.standard_error[row])
    return Measurement(value=float(estimate.value[row]), standard_error=error if math.isfinite(error) else None)


def _curves_by_text(measured: Measurements) -> dict[str, dict[Dial, Response]]:
    """Give the curves of several texts by name. With one text they are the profile's own."""
    by_text = measured.responses.by_text
    if len(by_text) < 2:
        return {}
    return {name: _curves(curves) for name, curves in zip(measured.texts, by_text, strict=True)}


def _curves(means: dict[Dial, ResponseMeans]) -> dict[Dial, Response]:
    return {dial: _response(curve) for dial, curve in means.items()}


def _response(means: ResponseMeans) -> Response:
    columns = {name: tuple(column.tolist()) for name, column in means._asdict().items()}
    temperature = tuple(None if math.isnan(value) else value for value in columns.pop("temperature"))
    return Response(**columns, temperature=temperature)
