"""A steering request: the same in Python, on the command line and over the wire, whatever runs the model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from confsteer.errors import SteeringError, first_problem

Dial = Literal["entropy", "unigram"]


class DialWords(NamedTuple):
    """Names of the neurons on a dial."""

    neurons: str
    """In a sentence: ``entropy`` or ``token-frequency`` neurons."""
    group: Literal["entropy", "frequency"]
    """In a steering, in place of a neuron's index: all of them."""


DIALS: dict[Dial, DialWords] = {
    "entropy": DialWords("entropy", "entropy"),
    "unigram": DialWords("token-frequency", "frequency"),
}
MADE_BY_HAND = "null direction, made by hand"
"""Name, wherever people read it, for what an entropy dial turns in place of neurons that were found."""
MAX_CHARACTERS = 10_000
"""Longest request, in JSON or in text: dozens of neurons by name fit."""
MAX_NEURONS = 1_000
"""That one request names: profiles have dozens."""
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Bound = Number | None
EXPERT_NEURON = r"^(?:0|[1-9][0-9]{0,8}|shared)\.(?:0|[1-9][0-9]{0,8})$"
"""A neuron of an expert: ``3.17`` is number 17 of expert 3, ``shared.17`` of the shared expert."""
NeuronKey = int | Literal["entropy", "frequency"] | Annotated[str, Field(pattern=EXPERT_NEURON)]
PresetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]


class SteeringFields(TypedDict, total=False):
    """The keywords of `Steering`, for editors and type checkers."""

    entropy: float | None
    unigram: float | None
    scale: dict[NeuronKey, float]
    shift: dict[NeuronKey, float]
    clamp: dict[NeuronKey, float | tuple[float | None, float | None]]
    positions: Literal["all", "generated"]
    preset: str | None


class Steering(BaseModel):
    """How to steer one request. Everything left out stays as it is.

    In Python a keyword each (``steer(model, profile, entropy=0.3)``), over the wire the same names in JSON
    (``{"entropy": 0.3}``). Neurons are named by their index, or ``"entropy"`` and ``"frequency"`` for all of a kind. Those of a
    mixture of experts are named by expert and index: ``"3.17"``, ``"shared.17"``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    entropy: Number | None = None
    """Change of the mean next-token entropy, in nats: above 0 less confident, below 0 more."""
    unigram: Number | None = None
    """How much closer to the unigram distribution the output comes, in nats of KL(P_model ‖ P_freq); below 0 farther."""
    scale: dict[NeuronKey, Number] = {}
    """Factor on a neuron's deviation from its mean activation: 0 ablates it, 1 leaves it."""
    shift: dict[NeuronKey, Number] = {}
    """Change of a neuron's activation, in the activation's own units."""
    clamp: dict[NeuronKey, Number | tuple[Bound, Bound]] = {}
    """Value a neuron's activation is set to, or the range it is kept in; None for no bound on a side."""
    positions: Literal["all", "generated"] = "all"
    """``generated``: in a pass over a prompt, steer only the last position, the one that generates."""
    preset: PresetName | None = None
    """A steering stored in the profile, by its name; what is given beside it takes the place of its fields."""

    @field_validator("scale", "shift", "clamp", mode="before")
    @classmethod
    def _read_neuron_keys(cls, value: Any) -> Any:
        """JSON has only string keys, and no tuples."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_NEURONS:
            raise ValueError(f"{len(value):,} neurons are named; a steering names at most {MAX_NEURONS:,}")
        if "null" in value:
            raise ValueError("a null direction is no neuron, and has nothing to scale, shift or clamp: turn it with entropy=NATS")
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
            if len(request) > MAX_CHARACTERS:
                raise SteeringError(f"a steering has at most {MAX_CHARACTERS:,} characters; this one has {len(request):,}")
            request = _read_json(request) if request.lstrip().startswith("{") else _read_text(request)
        if not isinstance(request, dict):
            raise SteeringError(f'a steering is an object such as {{"entropy": 0.3}}, not {type(request).__name__}')
        # Before pydantic, whose error has a line for each of them.
        for key in request:
            if key not in cls.model_fields:
                raise SteeringError(f"unknown key {str(key)[:80]!r}; a steering has {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(request)
        except ValidationError as error:
            raise SteeringError(_sentence(error)) from error

    def __str__(self) -> str:
        """As on the command line: ``entropy=+0.3 scale.757=0``; ``neutral`` if it changes nothing."""
        parts = [] if self.preset is None else [f"preset={self.preset}"]
        parts += [f"{dial}={getattr(self, dial):+g}" for dial in DIALS if getattr(self, dial) is not None]
        parts += [f"scale.{key}={value:g}" for key, value in self.scale.items()]
        parts += [f"shift.{key}={value:g}" for key, value in self.shift.items()]
        for key, value in self.clamp.items():
            bounds = value if isinstance(value, tuple) else (value,)
            parts.append(f"clamp.{key}=" + ":".join("" if b is None else f"{b:g}" for b in bounds))
        if self.positions != "all":
            parts.append(f"positions={self.positions}")
        return " ".join(parts) or "neutral"


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteeringError(f'a steering is a JSON object such as {{"entropy": 0.3}}; this is not JSON: {error}') from error


def _read_text(text: str) -> dict[str, Any]:
    """``key=value`` words; a neuron's are ``scale.5=0``, ``shift.5=-1``, ``clamp.5=2`` and ``clamp.5=LOW:HIGH``."""

    def number(word: str, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            raise SteeringError(f"{word}: {value!r} is not a number") from None

    request: dict[str, Any] = {}
    given: set[str] = set()
    if not text.strip():
        raise SteeringError("an empty text asks for nothing: leave it out, or write neutral for no change")
    for word in text.split() if text != "neutral" else ():
        key, equals, value = word.partition("=")
        if not equals:
            raise SteeringError(f"{word!r} is not KEY=VALUE, such as entropy=0.3")
        if key in given:
            raise SteeringError(f"{word!r}: {key} has been given already")
        given.add(key)
        if key in ("positions", "preset"):
            request[key] = value
        elif "." in key:
            key, _, neuron = key.partition(".")
            bounds = tuple(number(word, bound) if bound else None for bound in value.split(":"))
            neurons = request.setdefault(key, {})
            if not isinstance(neurons, dict):
                raise SteeringError(f"{word!r}: {key} has been given already, without a neuron")
            neurons[neuron] = bounds if len(bounds) == 2 else number(word, value)
        else:
            request[key] = number(word, value)
    return request


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation error, with the key it is about."""
    given = repr(error.errors()[0]["input"])
    return f"{first_problem(error, whole='steering')} (given {given[:60]})"
