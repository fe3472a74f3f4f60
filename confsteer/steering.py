"""A steering request, and what it does to each neuron: shared by every runtime.

One rule covers everything: an activation ``a`` becomes ``clip(gain · a + bias, low, high)``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from confsteer.errors import SteeringError
from confsteer.profile import DIALS, Neuron, Profile

Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Bound = Number | None
NeuronKey = int | Literal["entropy", "frequency"]


class Steering(BaseModel):
    """How to steer one request. Everything left out stays as it is.

    In Python a keyword each (``steer(model, profile, entropy=0.3)``), over the wire the same names in JSON
    (``{"entropy": 0.3}``). Neurons are named by their index, or ``"entropy"`` and ``"frequency"`` for all of a kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    entropy: Number | None = None
    """Change of the mean next-token entropy, in nats: above 0 less confident, below 0 more."""
    unigram: Number | None = None
    """How much closer to the unigram distribution the output comes, in nats of KL(P_model ‖ P_freq); below 0 farther."""
    scale: dict[NeuronKey, Number] = {}
    """Factor on a neuron's deviation from its mean activation: 0 ablates it, 1 leaves it."""
    clamp: dict[NeuronKey, Number | tuple[Bound, Bound]] = {}
    """Value a neuron's activation is set to, or the range it is kept in; None for no bound on a side."""
    positions: Literal["all", "generated"] = "all"
    """``generated``: in a pass over a prompt, steer only the last position, the one that generates."""

    @field_validator("scale", "clamp", mode="before")
    @classmethod
    def _read_neuron_keys(cls, value: Any) -> Any:
        """JSON has only string keys, and no tuples."""
        if not isinstance(value, dict):
            return value
        keys = [int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key for key in value]
        if len(set(keys)) != len(keys):
            raise ValueError("a neuron is named twice")
        return {key: tuple(item) if isinstance(item, list) else item for key, item in zip(keys, value.values(), strict=True)}

    @field_validator("clamp")
    @classmethod
    def _bounds_are_ordered(cls, value: dict[NeuronKey, Any]) -> dict[NeuronKey, Any]:
        for key, bounds in value.items():
            if isinstance(bounds, tuple) and None not in bounds and bounds[0] > bounds[1]:
                raise ValueError(f"neuron {key}: the lower bound {bounds[0]:g} is above the upper bound {bounds[1]:g}")
        return value

    @classmethod
    def parse(cls, request: Steering | dict[str, Any] | str) -> Steering:
        """A steering from keywords, from JSON, or from the text that `str` gives: ``entropy=0.3 scale.757=0 clamp.760=:2``.

        Raises:
            SteeringError: it is malformed; the sentence names the key and what is wrong with it.
        """
        if isinstance(request, Steering):
            return request
        if isinstance(request, str):
            request = _read_json(request) if request.lstrip().startswith("{") else _read_text(request)
        if not isinstance(request, dict):
            raise SteeringError(f'a steering is an object such as {{"entropy": 0.3}}, not {type(request).__name__}')
        try:
            return cls.model_validate(request)
        except ValidationError as error:
            raise SteeringError(_sentence(error)) from error

    def __str__(self) -> str:
        """As on the command line: ``entropy=+0.3 scale.757=0``; ``neutral`` if it changes nothing."""
        parts = [f"{dial}={getattr(self, dial):+g}" for dial in DIALS if getattr(self, dial) is not None]
        parts += [f"scale.{key}={value:g}" for key, value in self.scale.items()]
        for key, value in self.clamp.items():
            bounds = value if isinstance(value, tuple) else (value,)
            parts.append(f"clamp.{key}=" + ":".join("" if b is None else f"{b:g}" for b in bounds))
        if self.positions != "all":
            parts.append(f"positions={self.positions}")
        return " ".join(parts) or "neutral"


class NeuronEdit(NamedTuple):
    """``a' = clip(gain · a + bias, low, high)`` for each of a profile's neurons, float32 ``[neurons]``."""

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]


def steerable(profile: Profile) -> tuple[Neuron, ...]:
    """The neurons that steering can reach, in the order of every `NeuronEdit`.

    Raises:
        NoNeuronsError: there are none.
    """
    neurons = (*profile.entropy_neurons, *profile.frequency_neurons)
    if not neurons:
        raise profile.no_neurons("entropy", "token-frequency")
    return neurons


def neuron_edit(steering: Steering, profile: Profile) -> NeuronEdit:
    """What `steering` does to each of the profile's neurons.

    A neuron is first scaled about its mean, then pushed by the dials, then clamped.

    Raises:
        SteeringError: a dial is out of reach, or a neuron is not in the profile.
        NoNeuronsError: the model has no neurons of the kind asked for.
    """
    neurons = steerable(profile)
    rows = {neuron.index: row for row, neuron in enumerate(neurons)}
    groups = {
        "entropy": [rows[neuron.index] for neuron in profile.entropy_neurons],
        "frequency": [rows[neuron.index] for neuron in profile.frequency_neurons],
    }

    def rows_of(key: NeuronKey) -> list[int]:
        found = groups[key] if isinstance(key, str) else [rows[key]] if key in rows else []
        if not found:
            what = f"{key} neurons" if isinstance(key, str) else f"neuron {key}"
            raise SteeringError(f"{what}: not in the profile of {profile.model.id}, which has {', '.join(map(str, rows))}")
        return found

    mean = np.array([neuron.mean_activation for neuron in neurons])
    gain, bias = np.ones(len(neurons)), np.zeros(len(neurons))
    low, high = np.full(len(neurons), -np.inf), np.full(len(neurons), np.inf)
    for key, factor in steering.scale.items():
        gain[rows_of(key)] = factor
    bias += (1 - gain) * mean
    for dial in DIALS:
        change = getattr(steering, dial)
        if change:
            position = profile.dial_position(dial, change)
            for neuron in profile.neurons(dial):
                bias[rows[neuron.index]] += position * neuron.sign * neuron.std_activation
    for key, bounds in steering.clamp.items():
        lower, upper = bounds if isinstance(bounds, tuple) else (bounds, bounds)
        low[rows_of(key)] = -np.inf if lower is None else lower
        high[rows_of(key)] = np.inf if upper is None else upper
    return NeuronEdit(*(column.astype(np.float32) for column in (gain, bias, low, high)))


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteeringError(f'a steering is a JSON object such as {{"entropy": 0.3}}; this is not JSON: {error}') from error


def _read_text(text: str) -> dict[str, Any]:
    """``key=value`` words; ``scale.NEURON=FACTOR``, ``clamp.NEURON=VALUE`` and ``clamp.NEURON=LOW:HIGH`` for neurons."""

    def number(word: str, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            raise SteeringError(f"{word}: {value!r} is not a number") from None

    request: dict[str, Any] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise SteeringError(f"{word!r} is not KEY=VALUE, such as entropy=0.3")
        if word == "positions=generated" or word == "positions=all":
            request[key] = value
        elif "." in key:
            key, _, neuron = key.partition(".")
            bounds = tuple(number(word, bound) if bound else None for bound in value.split(":"))
            request.setdefault(key, {})[neuron] = bounds if len(bounds) == 2 else number(word, value)
        else:
            request[key] = number(word, value)
    return request


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation error, with the key it is about."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("[key]",))[:80]
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; a steering has {', '.join(Steering.model_fields)}"
    given = repr(first["input"])
    return f"{where}: {first['msg']} (given {given[:60]})"
