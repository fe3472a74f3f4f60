"""A steering request: the same in Python, on the command line and over the wire, whatever runs the model."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from confsteer.errors import SteeringError, first_problem

Dial = Literal["entropy", "unigram"]


class DialWords(NamedTuple):
    """Names of the neurons on a dial."""

    neurons: str
    """Their kind in a sentence: ``entropy`` or ``token-frequency``."""
    group: Literal["entropy", "frequency"]
    """Their name in a steering, in place of a neuron's index: all of them."""


DIALS: dict[Dial, DialWords] = {
    "entropy": DialWords("entropy", "entropy"),
    "unigram": DialWords("token-frequency", "frequency"),
}
MADE_BY_HAND = "null direction, made by hand"
"""Name, for readers, of what an entropy dial turns in place of neurons that were found."""
MAX_CHARACTERS = 10_000
"""Most characters of a request, in JSON or in text. Dozens of neurons by name fit."""
MAX_NEURONS = 1_000
"""Most neurons that one request names. Profiles have dozens."""
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Bound = Number | None
EXPERT_NEURON = r"^(?:0|[1-9][0-9]{0,8}|shared)\.(?:0|[1-9][0-9]{0,8})$"
"""Pattern of an expert's neuron: ``3.17`` is number 17 of expert 3, ``shared.17`` is number 17 of the shared expert."""
NeuronKey = int | Literal["entropy", "frequency"] | Annotated[str, Field(pattern=EXPERT_NEURON)]
PresetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
MAX_MARKER = 200
"""Most characters, or token ids, of a marker that steering begins after."""
_SPACE = r"\u0020"
"""A space inside JSON, where the command line splits words at spaces."""


class First(BaseModel):
    """The first tokens that are generated."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    first: Annotated[int, Field(ge=1, le=10**9)]
    """How many."""

    def __str__(self) -> str:
        """Write it as on the command line."""
        return f"first:{self.first}"


class After(BaseModel):
    """The tokens that are generated after a marker."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    after: str | tuple[int, ...]
    """Text of the marker, or its token ids in their order."""

    @field_validator("after", mode="before")
    @classmethod
    def _read_ids(cls, value: Any) -> Any:
        """Make a list a tuple: JSON has no tuples."""
        marker = tuple(value) if isinstance(value, list) else value
        if not isinstance(marker, str) and not (isinstance(marker, tuple) and all(type(token) is int for token in marker)):
            raise ValueError("a marker is text, or a list of token ids")
        return marker

    @field_validator("after")
    @classmethod
    def _can_be_found(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if not 1 <= len(value) <= MAX_MARKER:
            raise ValueError(f"a marker is 1 to {MAX_MARKER} characters, or as many token ids; this one is {len(value):,}")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("a marker is text, and this one has half a character (a lone surrogate)") from None
        elif min(value) < 0:
            raise ValueError(f"{min(value)} is no token id: they are 0 or more")
        return value

    def __str__(self) -> str:
        """Write it as on the command line: the text itself where that is possible, else JSON without spaces."""
        if isinstance(self.after, str) and self.after.isprintable() and " " not in self.after:
            return f"after:{self.after}"
        return json.dumps(self.model_dump(), separators=(",", ":")).replace(" ", _SPACE)


def _kind_of_positions(value: Any) -> str | None:
    if value in ("all", "generated"):
        return "word"
    kinds = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, First | After) else ()
    return next((kind for kind in ("first", "after") if kind in kinds), None)


Positions = Annotated[
    Annotated[Literal["all", "generated"], Tag("word")] | Annotated[First, Tag("first")] | Annotated[After, Tag("after")],
    Discriminator(
        _kind_of_positions,
        custom_error_type="positions",
        custom_error_message='should be all, generated, {"first": N} or {"after": TEXT or token ids}',
    ),
]


class SteeringFields(TypedDict, total=False):
    """The keywords of `Steering`, for editors and type checkers."""

    entropy: float | None
    unigram: float | None
    scale: dict[NeuronKey, float]
    shift: dict[NeuronKey, float]
    clamp: dict[NeuronKey, float | tuple[float | None, float | None]]
    positions: Literal["all", "generated"] | First | After | dict[str, int | str | list[int]]
    preset: str | None


class Steering(BaseModel):
    """How to steer one request. Everything left out stays as it is.

    In Python each field is a keyword: ``steer(model, profile, entropy=0.3)``. Over the wire the same names are in JSON:
    ``{"entropy": 0.3}``. Neurons are named by their index, or by ``"entropy"`` and ``"frequency"`` for all of a kind. Those
    of a mixture of experts are named by expert and index: ``"3.17"``, ``"shared.17"``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    entropy: Number | None = None
    """Change of the mean next-token entropy, in nats. Above 0 the model is less confident, below 0 more."""
    unigram: Number | None = None
    """How much closer the output comes to the unigram distribution, in nats of KL(P_model ‖ P_freq). Below 0: farther."""
    scale: dict[NeuronKey, Number] = {}
    """Factor on a neuron's deviation from its mean activation: 0 ablates it, 1 leaves it."""
    shift: dict[NeuronKey, Number] = {}
    """Change of a neuron's activation, in the activation's own units."""
    clamp: dict[NeuronKey, Number | tuple[Bound, Bound]] = {}
    """Value that a neuron's activation is set to, or the range it is kept in. None: no bound on that side."""
    positions: Positions = "all"
    """Tokens whose choice is steered. A token is chosen by the model's pass over the position before it.

    - ``all``: every position, those within the prompt among them.
    - ``generated``: the last position of the prompt, which chooses the first new token, and all positions after it.
    - ``{"first": N}``: the choice of the first N tokens that are generated, and no other.
    - ``{"after": MARKER}``: the choice of every token after the marker is complete. The first of them is the first token after
      the one that completes it. What follows the marker within that token was chosen with it, unsteered.

    A marker is looked for in what this request generates, never in its prompt, and once found it stays found. A marker of
    text is compared byte by byte with the text of the tokens, special ones included. It is found however the model splits it
    into tokens, also if it begins or ends within one. Capitals, spaces and accents count. A marker of token ids is compared
    with the ids themselves: the same text in other tokens is not the marker.
    """
    preset: PresetName | None = None
    """Name of a steering stored in the profile. Fields that are given beside it replace the stored ones."""

    @field_validator("scale", "shift", "clamp", mode="before")
    @classmethod
    def _read_neuron_keys(cls, value: Any) -> Any:
        """Read keys and bounds as JSON has them: it has only string keys, and no tuples."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_NEURONS:
            raise ValueError(f"{len(value):,} neurons are named; a steering names at most {MAX_NEURONS:,}")
        if "null" in value:
            raise ValueError("a null direction is no neuron and cannot be scaled, shifted or clamped: turn it with entropy=NATS")
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
        """Read a steering from keywords, from JSON, or from the text that `str` gives: ``entropy=0.3 scale.767=0 clamp.760=:2``.

        Raises:
            SteeringError: it is malformed. The sentence names the key and what is wrong with it.
        """
        if isinstance(request, Steering):
            return request
        if isinstance(request, str):
            if len(request) > MAX_CHARACTERS:
                raise SteeringError(f"a steering has at most {MAX_CHARACTERS:,} characters; this one has {len(request):,}")
            request = _read_json(request) if request.lstrip().startswith("{") else _read_text(request)
        if not isinstance(request, dict):
            raise SteeringError(f'a steering is an object such as {{"entropy": 0.3}}, not {type(request).__name__}')
        # Refuse unknown keys before pydantic does: its error has a line for each of them.
        for key in request:
            if key not in cls.model_fields:
                raise SteeringError(f"unknown key {str(key)[:80]!r}; a steering has {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(request)
        except ValidationError as error:
            raise SteeringError(_sentence(error)) from error

    def __str__(self) -> str:
        """Write it as on the command line: ``entropy=+0.3 scale.767=0``, or ``neutral`` if it changes nothing."""
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
    """Read ``key=value`` words. A neuron's are ``scale.5=0``, ``shift.5=-1``, ``clamp.5=2`` and ``clamp.5=LOW:HIGH``."""

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
        if key == "preset":
            request[key] = value
        elif key == "positions":
            request[key] = _read_positions(value)
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


def _read_positions(text: str) -> Any:
    """Read ``first:20``, ``after:</think>``, JSON or a word."""
    kind, _, value = text.partition(":")
    if text.startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"positions={text[:80]}: not JSON ({error}); write a space in it as {_SPACE}") from error
    if kind == "after":
        return {"after": value}
    if kind == "first":
        if not (value.isascii() and value.isdigit() and len(value) < 11):
            raise SteeringError(f"positions={text}: {value[:80]!r} is not a number of tokens")
        return {"first": int(value)}
    return text


def _sentence(error: ValidationError) -> str:
    """Say the first problem of a validation error, with the key it is about."""
    given, problem = repr(error.errors()[0]["input"]), first_problem(error, whole="steering")
    # Take out the name of the kind of positions, which pydantic puts before the key of the same name.
    problem = re.sub(r"^positions\.(first|after)\.\1\b", r"positions.\1", problem)
    return f"{problem} (given {given[:60]})"
