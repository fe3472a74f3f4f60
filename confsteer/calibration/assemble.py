"""Profile made of what the stages measured."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from confsteer.calibration.stages import FoldedLayer, Responses
from confsteer.discovery.response import ResponseMeans
from confsteer.discovery.select import Chosen, percentile
from confsteer.discovery.streaming import ActivationMoments, NeuronEffects, WithError
from confsteer.profile.profile import Profile
from confsteer.profile.schema import CorpusIdentity, Layer, Measurement, ModelIdentity, Neuron, Response, library_versions
from confsteer.steering import DIALS, Dial
from confsteer.text.counts import counts_sha256
from confsteer.text.windows import Windows


class Measurements(NamedTuple):
    """The results of the stages."""

    moments: ActivationMoments
    effects: NeuronEffects
    """Effects of every neuron of the layer."""
    chosen: dict[Dial, Chosen]
    responses: Responses


def identify_corpus(windows: Windows, counts: Tensor, *, kept_tokens: int) -> CorpusIdentity:
    """Say which text the profile rests on, and which token counts ``[tokenizer_size]``."""
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
        identity: of the model.
        corpus: that it was calibrated on.
        layer: its last layer, by its weights.
        measured: the same, by what it does.
        seed: of the random directions behind the chance levels.
    """
    weights, moments, effects = layer.weights, measured.moments, measured.effects
    statistics = {
        "norm": weights.norm,
        "logit_variance": weights.logit_variance,
        "null_fraction": weights.null_fraction,
        "frequency_cosine": layer.cosine,
        "mean_activation": moments.mean,
        "std_activation": moments.std,
    }
    # The reported effects are in the order of the dials.
    neurons: dict[Dial, list[Neuron]] = {}
    row = 0
    for dial in DIALS:
        chosen = measured.chosen[dial]
        neurons[dial] = [
            _neuron(identity.layer, index, statistics, chosen.slope, _reported(measured.responses, row + i))
            for i, index in enumerate(chosen.neurons)
        ]
        row += len(chosen.neurons)
    return Profile.create(
        model=identity,
        corpus=corpus,
        seed=seed,
        versions=library_versions(),
        layer=Layer(
            null_dims=weights.null_dims,
            chance_null_fraction=weights.chance_null_fraction,
            chance_frequency_cosine=layer.chance_cosine,
            entropy=measured.responses.entropy,
            loss=measured.responses.loss,
        ),
        entropy_neurons=tuple(neurons["entropy"]),
        frequency_neurons=tuple(neurons["unigram"]),
        response={dial: _response(curve) for dial, curve in measured.responses.curves.items()},
        columns={
            **statistics,
            "singular_values": weights.singular_values,
            **{name: estimate.value for name, estimate in effects._asdict().items()},
            **{f"{name}_standard_error": estimate.standard_error for name, estimate in effects._asdict().items()},
        },
    )


class _Reported(NamedTuple):
    """One neuron's row of the exact effects."""

    effects: dict[str, Measurement]
    uncapped: dict[str, Measurement]
    """Empty for a model without a softcap."""
    argmax_changed: float


def _reported(responses: Responses, row: int) -> _Reported:
    effects, uncapped, argmax_changed = responses.reported
    return _Reported(
        effects=_measurements(effects, row),
        uncapped={} if uncapped is None else _measurements(uncapped, row),
        argmax_changed=float(argmax_changed[row]),
    )


def _neuron(layer: int, index: int, statistics: dict[str, Tensor], slope: Tensor, reported: _Reported) -> Neuron:
    """Gather what is known of a neuron of the layer."""
    effects, uncapped = reported.effects, reported.uncapped
    return Neuron(
        layer=layer,
        index=index,
        sign=1 if float(slope[index]) > 0 else -1,
        **{name: float(column[index]) for name, column in statistics.items()},
        norm_percentile=float(percentile(statistics["norm"])[index]),
        logit_variance_percentile=float(percentile(statistics["logit_variance"])[index]),
        total_effect=effects["total"],
        direct_effect=effects["direct"],
        mediation=effects["mediation"],
        loss_effect=effects["loss"],
        entropy_effect=effects["entropy"],
        entropy_effect_abs=effects["entropy_abs"],
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


def _response(curve: ResponseMeans) -> Response:
    return Response(**{name: tuple(column.tolist()) for name, column in curve._asdict().items()})
