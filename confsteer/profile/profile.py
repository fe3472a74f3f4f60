"""The findings of a calibration, and a steering as an edit of its neurons."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
from pydantic import FailFast, Field, PrivateAttr, ValidationError, model_validator
from torch import Tensor

from confsteer.discovery.response import monotone_range
from confsteer.discovery.streaming import NeuronEffects, WithError
from confsteer.discovery.weights import WeightStatistics
from confsteer.errors import (
    NoNeuronsError,
    ProfileCorruptError,
    ProfileMismatchError,
    SteeringError,
    first_problem,
)
from confsteer.last_layer.edit import NeuronEdit
from confsteer.last_layer.intervention import Intervention
from confsteer.model.anatomy import Anatomy
from confsteer.profile import store
from confsteer.profile.schema import ColumnsFile, CorpusIdentity, Layer, ModelIdentity, Neuron, NullDirection, Response, Sparse
from confsteer.steering import DIALS, After, Dial, NeuronKey, PresetName, Steering

MAX_PRESETS = 100


class Profile(Sparse):
    """Findings of a calibration of one model, or of a scan of its weights alone."""

    model: ModelIdentity
    corpus: CorpusIdentity | None
    """None if the profile is of the weights alone, without neurons and dials."""
    seed: int
    """Seed of the random directions behind the chance levels."""
    versions: dict[str, str]
    """Versions of the libraries that made it."""
    layer: Layer
    entropy_neurons: Annotated[tuple[Neuron, ...], FailFast()]
    """Largest mean |Δentropy| first."""
    frequency_neurons: Annotated[tuple[Neuron, ...], FailFast()]
    """Largest mean |ΔKL(P_freq ‖ P_model)| first."""
    null_direction: NullDirection | None = None
    """The direction that the entropy dial turns, made by hand. None if the dial turns entropy neurons."""
    response: dict[Dial, Response]
    """One curve per dial that has something to turn. With several texts, it is the mean of theirs: they count equally."""
    responses_by_text: dict[str, dict[Dial, Response]] = Field(default={})
    """The same dials at the same positions on each text, by its name. Empty for a single text."""
    presets: dict[PresetName, Steering] = Field(default={})
    """Steerings by name."""
    columns_file: ColumnsFile
    _columns: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def __repr__(self) -> str:
        """Write one line. The whole profile is in `model_dump`, and ``confsteer show`` prints it."""
        kinds = f"{len(self.entropy_neurons)} entropy and {len(self.frequency_neurons)} token-frequency neurons"
        found = "scanned by its weights alone" if self.corpus is None else f"{kinds} in layer {self.model.layer}"
        return f"<Profile of {self.model.id}: {found}>"

    __str__ = __repr__

    @model_validator(mode="after")
    def _is_consistent(self) -> Profile:
        neurons = (*self.entropy_neurons, *self.frequency_neurons)
        indices = [neuron.index for neuron in neurons]
        if len(set(indices)) != len(indices):
            raise ValueError("a neuron is listed twice")
        if any(index >= self.model.n_neurons for index in indices):
            raise ValueError(f"a neuron's index is beyond the layer's {self.model.n_neurons} neurons")
        if any(neuron.key != self.model.key(neuron.index) for neuron in neurons):
            raise ValueError("a neuron's name is not that of its index")
        if any(neuron.layer != self.model.layer for neuron in neurons):
            raise ValueError(f"a neuron is not in layer {self.model.layer}")
        for dial in DIALS:
            turns = self.turns_direction(dial) or any(neuron.sign for neuron in self.neurons(dial))
            if turns != (dial in self.response):
                raise ValueError(
                    f"the {dial} dial must have a response curve if and only if it has neurons with a sign, or a null direction"
                )
        for text, curves in self.responses_by_text.items():
            if {dial: curve.position for dial, curve in curves.items()} != {d: c.position for d, c in self.response.items()}:
                raise ValueError(f"the response on {text!r} must be of the same dials and positions as that of all texts")
        for name in ("chance_frequency_cosine", "entropy", "loss"):
            if (getattr(self.layer, name) is None) != (self.corpus is None):
                raise ValueError(f"layer.{name} must be given if and only if there is a corpus")
        if self.corpus is None and neurons:
            raise ValueError("neurons are measured on a corpus, and there is none")
        if self.corpus is None and self.null_direction is not None:
            raise ValueError("a null direction is measured on a corpus, and there is none")
        try:
            self._check_presets(self.presets)
        except NoNeuronsError as error:
            raise ValueError(str(error)) from error
        return self

    def _check_presets(self, presets: Mapping[str, Steering]) -> None:
        if len(presets) > MAX_PRESETS:
            raise SteeringError(f"{len(presets)} presets; a profile has at most {MAX_PRESETS}")
        for name, steering in presets.items():
            if steering.preset is not None:
                raise SteeringError(f"preset {name!r} is made of another preset, {steering.preset!r}: write out what it does")
            self.edit(steering)

    def with_preset(self, name: str, steering: Steering) -> Profile:
        """Copy the profile, with `steering` as its ``preset=name``.

        Raises:
            SteeringError: the name has other characters than letters, digits, ``.``, ``_`` and ``-``. Or the steering names
                another preset, or does not fit this profile. Or there are `MAX_PRESETS` presets already.
            NoNeuronsError: there are no neurons to steer.
        """
        Steering.parse({"preset": name})
        presets = {**self.presets, name: steering}
        self._check_presets(presets)
        return self.model_copy(update={"presets": presets})

    @classmethod
    def create(cls, *, columns: Mapping[str, Tensor], **fields: Any) -> Profile:
        """Make a profile with its columns, ``[n_neurons]`` or ``[d]`` tensors by name."""
        payload = safetensors.torch.save(dict(columns))
        digest = hashlib.sha256(payload).hexdigest()
        profile = cls(columns_file=ColumnsFile(file=f"columns-{digest[:12]}.safetensors", sha256=digest), **fields)
        profile._columns.update(columns)
        return profile

    def __eq__(self, other: object) -> bool:
        """Compare the fields alone: the hash of the columns is one of them."""
        return isinstance(other, Profile) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def checksum(self) -> str:
        """SHA-256 of ``profile.json``'s contents, which include the hash of the columns."""
        return store.checksum(self.model_dump(mode="json"))

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """Statistics of every neuron of the layer, ``[n_neurons]`` each; the unembedding's ``singular_values``; and the
        ``null_direction``, if there is one.
        """
        return self._columns

    @property
    def weights(self) -> WeightStatistics:
        """Statistics of the weights alone, as `confsteer.discovery.weights.weight_statistics` returned them."""
        return WeightStatistics(
            **{name: self._columns[name] for name in store.WEIGHT_COLUMNS},
            null_dims=self.layer.null_dims,
            chance_null_fraction=self.layer.chance_null_fraction,
        )

    @property
    def effects(self) -> NeuronEffects | None:
        """Effects of every neuron of the layer. None in a scan, and in older profiles that did not keep all of them."""
        names = NeuronEffects._fields
        if not all(name in self._columns for name in names):
            return None
        return NeuronEffects(*(WithError(self._columns[name], self._columns[f"{name}_standard_error"]) for name in names))

    def neurons(self, dial: Dial) -> tuple[Neuron, ...]:
        """The neurons of a dial's kind, found in the model."""
        return self.entropy_neurons if dial == "entropy" else self.frequency_neurons

    def turns_direction(self, dial: Dial) -> bool:
        """Whether a dial turns a null direction, made by hand, in place of neurons."""
        return dial == "entropy" and self.null_direction is not None

    def pushed(self, dial: Dial) -> tuple[Neuron, ...]:
        """The neurons that a dial turns."""
        return () if self.turns_direction(dial) else self.neurons(dial)

    def found(self, dial: Dial) -> list[int]:
        """Indices of the neurons of a dial's kind, the largest effect first.

        Raises:
            NoNeuronsError: the model has none with a clear sign.
        """
        neurons = self.neurons(dial)
        if not any(neuron.sign for neuron in neurons):
            raise self.no_neurons(dial)
        return [neuron.index for neuron in neurons]

    def require_neurons(self, dial: Dial) -> Response:
        """The dial's response curve.

        Raises:
            NoNeuronsError: the model has no neurons of this kind, and no null direction in their place.
        """
        if dial not in self.response:
            raise self.no_neurons(dial)
        return self.response[dial]

    def no_neurons(self, *dials: Dial) -> NoNeuronsError:
        """Make the error that says why these dials have no neurons to steer."""
        if self.corpus is None:
            return NoNeuronsError(
                f"this profile of {self.model.id} is a scan of its weights alone: there is nothing to steer before the neurons' "
                "effects are measured. Run confsteer calibrate on the model"
            )
        if unsigned := [neuron.key for dial in dials for neuron in self.neurons(dial)]:
            return NoNeuronsError(
                f"the {DIALS[dials[0]].neurons} neurons of {self.model.id} ({', '.join(map(str, unsigned))}) have no clear sign "
                "on the calibration text, so that no dial can turn them: scale, shift or clamp them by index"
            )
        missing = " and ".join(f"no {DIALS[dial].neurons} neurons" for dial in dials)
        by_hand = ". confsteer calibrate --null-direction makes an entropy dial by hand" if "entropy" in dials else ""
        return NoNeuronsError(
            f"{self.model.id} has {missing} (profile from {self.corpus.kept_tokens:,} tokens of "
            f"{self.corpus.source}): there is nothing to steer{by_hand}"
        )

    def reach(self, dial: Dial) -> tuple[float, float]:
        """Lowest and highest change that the dial can make, in nats.

        Raises:
            NoNeuronsError: the model has no neurons of this kind.
        """
        curve = self.require_neurons(dial)
        change = curve.change(dial)
        low, high = monotone_range(change, curve.zero)
        return change[low], change[high]

    def dial_position(self, dial: Dial, change: float) -> float:
        """Find the dial position that makes a change of `change` nats, by the response curve.

        Raises:
            NoNeuronsError: the model has no neurons of this kind.
            SteeringError: the change is out of reach.
        """
        curve = self.require_neurons(dial)
        lowest, highest = self.reach(dial)
        if not lowest <= change <= highest:
            raise SteeringError(
                f"{dial}={change:+g} is out of reach: on this model it can go from {lowest:+.3f} to {highest:+.3f} nats"
            )
        changes = curve.change(dial)
        low, high = monotone_range(changes, curve.zero)
        return float(np.interp(change, changes[low : high + 1], curve.position[low : high + 1]))

    @property
    def steerable(self) -> tuple[Neuron, ...]:
        """The neurons that steering can reach, in the order of every `NeuronEdit`.

        Raises:
            NoNeuronsError: there are none, and no null direction to steer in their place.
        """
        neurons = (*self.entropy_neurons, *self.frequency_neurons)
        if not neurons and self.null_direction is None:
            raise self.no_neurons(*DIALS)
        return neurons

    def resolve(self, steering: Steering) -> Steering:
        """Write out the preset of `steering`: the preset's fields, replaced by those that `steering` gives itself.

        Raises:
            SteeringError: the profile does not have the preset, or the model does not have a token.
        """
        if steering.preset is None:
            return self._with_known_tokens(steering)
        if steering.preset not in self.presets:
            presets = ", ".join(self.presets) or "(none)"
            raise SteeringError(f"preset {steering.preset!r}: not in the profile of {self.model.id}, which has {presets}")
        given = {name: getattr(steering, name) for name in steering.model_fields_set if name != "preset"}
        return self._with_known_tokens(self.presets[steering.preset].model_copy(update=given))

    def _with_known_tokens(self, steering: Steering) -> Steering:
        """
        Raises:
            SteeringError: it begins after a token that the model does not have.
        """
        match steering.positions:
            case After(after=tuple(ids)) if max(ids) >= self.model.vocab_size:
                raise SteeringError(
                    f"positions={steering.positions}: {max(ids)} is no token of {self.model.id}, whose ids end at "
                    f"{self.model.vocab_size - 1:,}"
                )
        return steering

    def edit(self, steering: Steering) -> NeuronEdit:
        """Translate `steering` into an edit of each of the profile's neurons. `null_write` gives the rest of it.

        A neuron is first scaled about its mean, then shifted and pushed by the dials, then clamped.

        Raises:
            SteeringError: a dial is out of reach, or a neuron or preset is not in the profile.
            NoNeuronsError: the model has no neurons of the kind asked for.
        """
        steering = self.resolve(steering)
        neurons = self.steerable
        mean = np.array([neuron.mean_activation for neuron in neurons])
        gain, bias = np.ones(len(neurons)), np.zeros(len(neurons))
        low, high = np.full(len(neurons), -np.inf), np.full(len(neurons), np.inf)
        for key, factor in steering.scale.items():
            gain[self._rows(key)] = factor
        bias += (1 - gain) * mean
        shift = np.zeros(len(neurons))
        for key, change in steering.shift.items():
            shift[self._rows(key)] = change
        bias += shift
        for dial in DIALS:
            if change := getattr(steering, dial):
                position = self.dial_position(dial, change)
                for neuron in self.pushed(dial):
                    bias[self._rows(neuron.key)] += position * neuron.sign * neuron.std_activation
        for key, bounds in steering.clamp.items():
            lower, upper = bounds if isinstance(bounds, tuple) else (bounds, bounds)
            low[self._rows(key)] = -np.inf if lower is None else lower
            high[self._rows(key)] = np.inf if upper is None else upper
        with np.errstate(over="ignore"):
            edit = NeuronEdit(*(column.astype(np.float32) for column in (gain, bias, low, high)))
        if not (np.isfinite(edit.gain).all() and np.isfinite(edit.bias).all()):
            raise self._too_much(steering)
        return edit

    def _too_much(self, steering: Steering) -> SteeringError:
        return SteeringError(f"{steering}: with the profile of {self.model.id} it adds more than a float32 holds")

    def null_write(self, steering: Steering) -> float:
        """Translate `steering` into the length of the vector that it adds along the null direction, right before the final norm.

        Returns:
            The length in units of the residual, above 0 to raise the entropy. It is 0 in a profile without a null direction.

        Raises:
            SteeringError, NoNeuronsError: see `edit`.
        """
        change = self.resolve(steering).entropy
        if self.null_direction is None or not change:
            return 0.0
        length = self.dial_position("entropy", change) * self.null_direction.push
        if not abs(length) <= np.finfo(np.float32).max:
            raise self._too_much(steering)
        return length

    def intervention(self, steering: Steering) -> Intervention:
        """Translate `steering` into its whole change of the last layer: `edit` and `null_write`.

        Raises:
            SteeringError, NoNeuronsError: see `edit`.
        """
        return Intervention.of(self.edit(steering), self.null_write(steering))

    def _rows(self, key: NeuronKey) -> list[int]:
        """Find the positions in `steerable` of the neurons that a steering's key means.

        Raises:
            SteeringError: the profile has none.
        """
        groups: dict[NeuronKey, tuple[Neuron, ...]] = {words.group: self.neurons(dial) for dial, words in DIALS.items()}
        meant = {neuron.key for neuron in groups[key]} if key in groups else {key}
        keys = [neuron.key for neuron in self.steerable]
        rows = [row for row, own in enumerate(keys) if own in meant]
        if not rows:
            what = f"{key} neurons" if key in groups else f"neuron {key}"
            has = ", ".join(map(str, keys)) or "none, but a null direction for its entropy dial, which is no neuron"
            hint = "" if self.model.experts else self._without_layer(key, keys)
            raise SteeringError(f"{what}: not in the profile of {self.model.id}, which has {has}{hint}")
        return rows

    def _without_layer(self, key: NeuronKey, keys: list[NeuronKey]) -> str:
        """Name the neuron that a key means which begins with the layer, as tables name neurons; empty if it means none."""
        layer, _, neuron = str(key).partition(".")
        meant = [str(own) for own in keys if str(own) == neuron]
        return f". A request names a neuron without its layer: {meant[0]}" if meant and layer == str(self.model.layer) else ""

    def check_model(self, anatomy: Anatomy) -> None:
        """
        Raises:
            ProfileMismatchError: the profile belongs to another model.
        """
        for name in ("layer", "n_neurons", "d_model", "vocab_size", "experts"):
            value = getattr(self.model, name)
            if (actual := getattr(anatomy, name)) != value:
                raise ProfileMismatchError(
                    f"the profile is of {self.model.id} with {name} {value}; this model has {name} {actual}"
                )
        if not anatomy.matches(self.model.fingerprints):
            raise ProfileMismatchError(
                f"the profile is of {self.model.id}; this model has the same shape but other weights. Calibrate it: "
                "confsteer calibrate MODEL"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the profile to a folder, whole or not at all, and return the folder.

        Raises:
            ProfileError: it cannot be written.
        """
        folder = Path(path)
        store.write(folder, self.model_dump(mode="json"), self.columns_file.file, self._columns)
        return folder

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Profile:
        """Load a profile from a folder, by the name of one in ``calibrations/``, or from a hub repository.

        Raises:
            ProfileNotFoundError: it is none of these.
            ProfileVersionError: its format is unknown.
            ProfileCorruptError: it is truncated, tampered with, or not a profile.
        """
        stored = store.read(store.find_profile(source) / store.FILE_NAME)
        try:
            profile = cls.model_validate_json(json.dumps(stored.fields))
        except ValidationError as error:
            raise ProfileCorruptError(f"{stored.file}: {first_problem(error, whole='profile')}") from error
        stored.check()
        profile._columns.update(
            store.read_columns(
                stored.file.parent / profile.columns_file.file,
                profile.columns_file.sha256,
                n_neurons=profile.model.n_neurons,
                null_dims=profile.layer.null_dims,
                measured=profile.corpus is not None,
                direction=None if profile.null_direction is None else profile.model.d_model,
            )
        )
        return profile


def schema() -> dict[str, Any]:
    """JSON schema of ``profile.json``."""
    described = Profile.model_json_schema()
    described["properties"] = {
        "format_version": {"enum": list(store.FORMAT_VERSIONS)},
        **described["properties"],
        "checksum": {"type": "string", "description": "SHA-256 of the rest, keys sorted."},
    }
    described["required"] = ["format_version", *described["required"], "checksum"]
    return described
