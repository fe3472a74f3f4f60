"""A profile: what calibration found in one model, on disk as ``profile.json`` and a safetensors file beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, PrivateAttr, ValidationError, model_validator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from confsteer.discovery.response import monotone_range
from confsteer.discovery.weights import WeightStatistics
from confsteer.errors import (
    NoNeuronsError,
    ProfileCorruptError,
    ProfileError,
    ProfileMismatchError,
    ProfileNotFoundError,
    ProfileVersionError,
    SteeringError,
    first_problem,
)
from confsteer.files import made, read_at_most, shipped_profiles, write_atomically
from confsteer.last_layer.edit import NeuronEdit
from confsteer.model.anatomy import Anatomy
from confsteer.model.layers import dtype_name
from confsteer.steering import DIALS, Dial, NeuronKey, PresetName, Steering
from confsteer.text.windows import vocabulary_size

FORMAT_VERSION = 1
FILE_NAME = "profile.json"
COLUMNS_PATTERN = "columns-*.safetensors"
WEIGHT_COLUMNS = ("norm", "logit_variance", "null_fraction", "singular_values")
"""Columns that the weights alone give, all a profile without a corpus has."""
MEASURED_COLUMNS = ("mean_activation", "mediation", "frequency", "frequency_mediation")
"""Columns of a profile with a corpus that something is made of."""

MAX_BYTES = 500_000
"""Of ``profile.json``: 64 neurons, the most that calibration reports, and dozens of presets that set each of them fit twice."""
MAX_COLUMNS_BYTES = 100_000_000
"""Of the columns: those of a layer of 300,000 neurons fit."""
MAX_PRESETS = 100

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
NonNegative = Annotated[float, Field(ge=0)]
# The first wrong item is enough: every further one would be a line of the error, and there may be very many.
Curve = Annotated[tuple[float, ...], FailFast()]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Measurement(_Strict):
    """A mean over the corpus's tokens with its standard error over windows."""

    value: float
    standard_error: NonNegative | None
    """None if the corpus was a single window."""


class Neuron(_Strict):
    """A neuron of the last MLP. Effects are those of setting it to its mean activation, in nats."""

    layer: Annotated[int, Field(ge=0)]
    index: Annotated[int, Field(ge=0)]
    sign: Literal[-1, 1]
    """Which way its activation goes when its dial goes up."""
    norm: NonNegative
    norm_percentile: Percent
    """Within the layer, as all percentiles."""
    logit_variance: NonNegative
    logit_variance_percentile: Percent
    null_fraction: Share
    """Share of its write in the unembedding's effective null space."""
    mean_activation: float
    std_activation: NonNegative
    total_effect: Measurement
    """Mean |Δloss|."""
    direct_effect: Measurement
    """Mean |Δloss| with the final norm frozen."""
    mediation: Measurement
    """1 − direct/total."""
    loss_effect: Measurement
    """Mean Δloss."""
    entropy_effect: Measurement
    """Mean Δentropy."""
    entropy_effect_abs: Measurement
    """Mean |Δentropy|."""
    frequency_effect: Measurement
    """Mean |ΔKL(P_freq ‖ P_model)|."""
    frequency_mediation: Measurement
    """1 − (mean |Δloss| with the logits held along the unigram direction)/total."""
    frequency_cosine: Annotated[float, Field(ge=-1, le=1)]
    """Cosine of its write to the logits with the unigram direction."""
    argmax_changed: Share
    """Share of tokens whose most likely next token changes."""
    total_effect_uncapped: Measurement | None = None
    """Mean |Δloss| of the logits before the model's softcap; None in models that have none, as the next."""
    entropy_effect_abs_uncapped: Measurement | None = None
    """Mean |Δentropy| before the softcap."""


class Response(_Strict):
    """What one dial does: means over the corpus (over an even sample of a long one) at each of its positions, in nats."""

    position: Curve
    """Dial positions, ascending, 0 among them; each neuron is pushed by position · sign · its standard deviation."""
    entropy: Curve
    kl_model_unigram: Curve
    """KL(P_model ‖ P_freq)"""
    kl_unigram_model: Curve
    """KL(P_freq ‖ P_model)"""
    loss: Curve
    argmax_changed: Annotated[tuple[Share, ...], FailFast()]

    @model_validator(mode="after")
    def _is_a_curve(self) -> Response:
        columns = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(columns.values())) != 1:
            raise ValueError(f"columns differ in length: {columns}")
        if 0.0 not in self.position or any(b <= a for a, b in zip(self.position, self.position[1:], strict=False)):
            raise ValueError("positions must rise and have 0 among them")
        return self

    @property
    def zero(self) -> int:
        """Index of position 0."""
        return self.position.index(0.0)

    def change(self, dial: Dial) -> tuple[float, ...]:
        """What each position does in the units of `dial`, in nats, relative to position 0.

        ``entropy``: change of the mean entropy. ``unigram``: how much closer to the unigram distribution the output comes.
        """
        values = self.entropy if dial == "entropy" else tuple(-kl for kl in self.kl_model_unigram)
        return tuple(value - values[self.zero] for value in values)


class ModelIdentity(_Strict):
    """The model a profile belongs to."""

    id: str
    """Hub id or folder it was loaded from."""
    revision: str | None
    """Commit on the hub, where there is one."""
    model_type: str
    layer: Annotated[int, Field(ge=0)]
    n_neurons: Annotated[int, Field(gt=0)]
    d_model: Annotated[int, Field(gt=0)]
    vocab_size: Annotated[int, Field(gt=0)]
    """Rows of the unembedding, padding included."""
    tokenizer_size: Annotated[int, Field(gt=0)]
    """Rows the tokenizer has ids for; the others are left out of every statistic."""
    dtype: str
    """Precision it was calibrated in."""
    fingerprints: dict[str, Sha256]
    """SHA-256 of the unembedding and the last projection, rounded to each precision."""

    @classmethod
    def of(
        cls, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, anatomy: Anatomy, *, revision: str | None = None
    ) -> ModelIdentity:
        """The identity of the model that these are of."""
        return cls(
            id=model_id(config),
            revision=revision,
            model_type=config.model_type,
            layer=anatomy.layer,
            n_neurons=anatomy.n_neurons,
            d_model=anatomy.d_model,
            vocab_size=anatomy.vocab_size,
            tokenizer_size=min(vocabulary_size(tokenizer), anatomy.vocab_size),
            dtype=dtype_name(anatomy.dtype),
            fingerprints=anatomy.fingerprints(),
        )


class CorpusIdentity(_Strict):
    """The text a profile was calibrated on."""

    source: str
    sha256: Sha256
    """Of the token ids and where the windows start."""
    tokens: Annotated[int, Field(gt=0)]
    kept_tokens: Annotated[int, Field(gt=0)]
    """Tokens that count: without the first positions and the last of each window, BOS, EOS and the token after these."""
    windows: Annotated[int, Field(gt=0)]
    window: Annotated[int, Field(gt=0)]
    """Tokens per window."""
    unigram_tokens: Annotated[int, Field(ge=0)]
    """Tokens that the unigram distribution was counted on: those of the text, or of counts given."""
    unigram_sha256: Sha256
    """Of the counts."""


class Layer(_Strict):
    """What the neurons were held against."""

    null_dims: Annotated[int, Field(gt=0)]
    """Directions counted as the unembedding's effective null space."""
    chance_null_fraction: Share
    """Exceeded by the luckiest of as many random directions as the layer has neurons 1 time in 20."""
    chance_frequency_cosine: Share | None
    """The same for the cosine with the unigram direction; this and what follows is None without a corpus."""
    entropy: NonNegative | None
    """Mean output entropy of the unsteered model on the corpus, in nats."""
    loss: NonNegative | None
    """Mean next-token loss of the unsteered model on the corpus, in nats."""


class ColumnsFile(_Strict):
    """The safetensors file with the statistics of every neuron of the layer."""

    file: Annotated[str, Field(pattern=r"^columns-[0-9a-f]{12}\.safetensors$")]
    sha256: Sha256


class Profile(_Strict):
    """What calibration found in one model, or what a scan found in its weights alone."""

    model: ModelIdentity
    corpus: CorpusIdentity | None
    """None: of the weights alone, without neurons and dials."""
    seed: int
    """Of the random directions behind the chance levels."""
    versions: dict[str, str]
    """Of the libraries that made it."""
    layer: Layer
    entropy_neurons: Annotated[tuple[Neuron, ...], FailFast()]
    """Largest mean |Δentropy| first."""
    frequency_neurons: Annotated[tuple[Neuron, ...], FailFast()]
    """Largest mean |ΔKL(P_freq ‖ P_model)| first."""
    response: dict[Dial, Response]
    """One curve per dial that has neurons."""
    presets: dict[PresetName, Steering] = {}
    """Steerings worth a name."""
    columns_file: ColumnsFile
    _columns: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def __repr__(self) -> str:
        """One line: all of it is in `model_dump`, and in what ``confsteer show`` prints."""
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
        if any(neuron.layer != self.model.layer for neuron in neurons):
            raise ValueError(f"a neuron is not in layer {self.model.layer}")
        for dial in DIALS:
            if bool(self.neurons(dial)) != (dial in self.response):
                raise ValueError(f"the {dial} dial must have a response curve if and only if it has neurons")
        for name in ("chance_frequency_cosine", "entropy", "loss"):
            if (getattr(self.layer, name) is None) != (self.corpus is None):
                raise ValueError(f"layer.{name} must be given if and only if there is a corpus")
        if self.corpus is None and neurons:
            raise ValueError("neurons are measured on a corpus, and there is none")
        self._check_presets(self.presets)
        return self

    def _check_presets(self, presets: Mapping[str, Steering]) -> None:
        if len(presets) > MAX_PRESETS:
            raise SteeringError(f"{len(presets)} presets; a profile has at most {MAX_PRESETS}")
        for name, steering in presets.items():
            if steering.preset is not None:
                raise SteeringError(f"preset {name!r} is made of another preset, {steering.preset!r}: write out what it does")
            self.edit(steering)

    def with_preset(self, name: str, steering: Steering) -> Profile:
        """A copy of the profile in which `steering` can be asked for as ``preset=name``.

        Raises:
            SteeringError: the name is not letters, digits, ``.``, ``_`` and ``-``; or the steering names another preset, or is
                nothing this profile can do; or there are `MAX_PRESETS` already.
            NoNeuronsError: there are no neurons to steer.
        """
        Steering.parse({"preset": name})
        presets = {**self.presets, name: steering}
        self._check_presets(presets)
        return self.model_copy(update={"presets": presets})

    @classmethod
    def create(cls, *, columns: Mapping[str, Tensor], **fields: Any) -> Profile:
        """A profile with its columns, ``[n_neurons]`` or ``[d]`` tensors by name."""
        payload = safetensors.torch.save(dict(columns))
        digest = hashlib.sha256(payload).hexdigest()
        profile = cls(columns_file=ColumnsFile(file=f"columns-{digest[:12]}.safetensors", sha256=digest), **fields)
        profile._columns.update(columns)
        return profile

    def __eq__(self, other: object) -> bool:
        """The hash of the columns is a field, so fields alone decide."""
        return isinstance(other, Profile) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def checksum(self) -> str:
        """SHA-256 of ``profile.json``'s contents, the hash of the columns among them."""
        return _checksum(FORMAT_VERSION, self.model_dump(mode="json"))

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """Statistics of every neuron of the layer, ``[n_neurons]`` each, and the unembedding's ``singular_values``."""
        return self._columns

    @property
    def weights(self) -> WeightStatistics:
        """What the weights alone say, as `confsteer.discovery.weights.weight_statistics` gave it."""
        return WeightStatistics(
            **{name: self._columns[name] for name in WEIGHT_COLUMNS},
            null_dims=self.layer.null_dims,
            chance_null_fraction=self.layer.chance_null_fraction,
        )

    def neurons(self, dial: Dial) -> tuple[Neuron, ...]:
        """The neurons on a dial."""
        return self.entropy_neurons if dial == "entropy" else self.frequency_neurons

    def require_neurons(self, dial: Dial) -> Response:
        """The dial's response curve.

        Raises:
            NoNeuronsError: the model has no neurons of this kind.
        """
        if dial not in self.response:
            raise self.no_neurons("entropy" if dial == "entropy" else "token-frequency")
        return self.response[dial]

    def no_neurons(self, *kinds: str) -> NoNeuronsError:
        """The error that says why there are no neurons of these kinds to steer."""
        if self.corpus is None:
            return NoNeuronsError(
                f"this profile of {self.model.id} is a scan of its weights alone: there is nothing to steer before the neurons' "
                "effects are measured. Run confsteer calibrate on the model"
            )
        missing = " and ".join(f"no {kind} neurons" for kind in kinds)
        return NoNeuronsError(
            f"{self.model.id} has {missing} (profile from {self.corpus.kept_tokens:,} tokens of "
            f"{self.corpus.source}): there is nothing to steer"
        )

    def reach(self, dial: Dial) -> tuple[float, float]:
        """Lowest and highest change the dial can make, in nats.

        Raises:
            NoNeuronsError: the model has no neurons of this kind.
        """
        curve = self.require_neurons(dial)
        change = curve.change(dial)
        low, high = monotone_range(change, curve.zero)
        return change[low], change[high]

    def dial_position(self, dial: Dial, change: float) -> float:
        """The dial position that makes `change` nats, by the response curve.

        Raises:
            NoNeuronsError: the model has no neurons of this kind.
            SteeringError: out of reach.
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
            NoNeuronsError: there are none.
        """
        neurons = (*self.entropy_neurons, *self.frequency_neurons)
        if not neurons:
            raise self.no_neurons("entropy", "token-frequency")
        return neurons

    def resolve(self, steering: Steering) -> Steering:
        """Write out the preset of `steering`: the preset's fields, and in place of them those that it gives itself.

        Raises:
            SteeringError: the profile has no such preset.
        """
        if steering.preset is None:
            return steering
        if steering.preset not in self.presets:
            presets = ", ".join(self.presets) or "(none)"
            raise SteeringError(f"preset {steering.preset!r}: not in the profile of {self.model.id}, which has {presets}")
        given = {name: getattr(steering, name) for name in steering.model_fields_set if name != "preset"}
        return self.presets[steering.preset].model_copy(update=given)

    def edit(self, steering: Steering) -> NeuronEdit:
        """Translate `steering` into what it does to each of the profile's neurons.

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
                for neuron in self.neurons(dial):
                    bias[self._rows(neuron.index)] += position * neuron.sign * neuron.std_activation
        for key, bounds in steering.clamp.items():
            lower, upper = bounds if isinstance(bounds, tuple) else (bounds, bounds)
            low[self._rows(key)] = -np.inf if lower is None else lower
            high[self._rows(key)] = np.inf if upper is None else upper
        with np.errstate(over="ignore"):
            edit = NeuronEdit(*(column.astype(np.float32) for column in (gain, bias, low, high)))
        if not (np.isfinite(edit.gain).all() and np.isfinite(edit.bias).all()):
            raise SteeringError(f"{steering}: with the profile of {self.model.id} it adds more than a float32 holds")
        return edit

    def _rows(self, key: NeuronKey) -> list[int]:
        """Positions in `steerable` of the neurons that a key of a steering means.

        Raises:
            SteeringError: the profile has none.
        """
        groups = {"entropy": self.entropy_neurons, "frequency": self.frequency_neurons}
        meant = {neuron.index for neuron in groups[key]} if isinstance(key, str) else {key}
        indices = [neuron.index for neuron in self.steerable]
        rows = [row for row, index in enumerate(indices) if index in meant]
        if not rows:
            what = f"{key} neurons" if isinstance(key, str) else f"neuron {key}"
            raise SteeringError(f"{what}: not in the profile of {self.model.id}, which has {', '.join(map(str, indices))}")
        return rows

    def check_model(self, anatomy: Anatomy) -> None:
        """
        Raises:
            ProfileMismatchError: the profile belongs to another model.
        """
        expected = {"layer": self.model.layer, "n_neurons": self.model.n_neurons, "d_model": self.model.d_model}
        expected["vocab_size"] = self.model.vocab_size
        for name, value in expected.items():
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
        """Write the profile to a folder, atomically, and return the folder.

        The columns are written first under a name made of their hash, then ``profile.json`` replaces the old one in a
        single step: whenever the process dies, the folder holds the old profile or the new one, whole.
        """
        folder = Path(path)
        document = self.model_dump(mode="json")
        document = {"format_version": FORMAT_VERSION, **document, "checksum": _checksum(FORMAT_VERSION, document)}
        payload = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
        if len(payload) > MAX_BYTES:
            raise ProfileError(
                f"the profile has {len(payload):,} bytes of JSON, at most {MAX_BYTES:,} can be read: fewer presets"
            )
        columns = folder / self.columns_file.file
        new = not columns.exists()
        try:
            with made(folder):
                write_atomically(columns, safetensors.torch.save(dict(self._columns)))
                try:
                    write_atomically(folder / FILE_NAME, payload)
                except OSError:
                    if new:
                        columns.unlink(missing_ok=True)
                    raise
                for old in folder.glob(COLUMNS_PATTERN):
                    if old.name != self.columns_file.file:
                        old.unlink()
        except OSError as error:
            raise ProfileError(f"cannot write the profile to {folder}: {error.strerror}") from error
        return folder

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Profile:
        """A profile from a folder, by the name of one in ``calibrations/``, or from a hub repository.

        Raises:
            ProfileNotFoundError: it is none of these.
            ProfileVersionError: its format is unknown.
            ProfileCorruptError: it is truncated, tampered with, or not a profile.
        """
        folder = find(source)
        document = _read_document(folder / FILE_NAME)
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ProfileVersionError(
                f"{folder / FILE_NAME} has format version {version!r}; this confsteer reads version {FORMAT_VERSION}. "
                "Upgrade confsteer, or calibrate again"
            )
        checksum = document.pop("checksum", None)
        try:
            profile = cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            raise ProfileCorruptError(f"{folder / FILE_NAME}: {first_problem(error, whole='profile')}") from error
        if checksum != _checksum(version, document):
            raise ProfileCorruptError(
                f"{folder / FILE_NAME} was changed after it was written (its checksum does not fit). Calibrate again, or get "
                "a fresh copy"
            )
        profile._columns.update(_read_columns(folder / profile.columns_file.file, profile))
        return profile


def find(source: str | os.PathLike[str]) -> Path:
    """The folder of a profile: a folder, the name of one in ``calibrations/``, or a hub repository, which is downloaded.

    Raises:
        ProfileNotFoundError: it is none of these.
    """
    path = Path(source)
    try:
        if (path / FILE_NAME).is_file():
            return path
        if path.is_dir():
            raise ProfileNotFoundError(f"{path} has no {FILE_NAME}: it is not a profile")
    except OSError as error:
        raise ProfileNotFoundError(f"cannot read {path}: {error.strerror}") from error
    name = str(source)
    shipped = shipped_profiles()
    if name in shipped:
        return shipped[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            downloaded = Path(snapshot_download(name, allow_patterns=[FILE_NAME, COLUMNS_PATTERN]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ProfileNotFoundError(f"no folder {name}, and the hub gave no such repository: {reason}") from error
        if not (downloaded / FILE_NAME).is_file():
            raise ProfileNotFoundError(f"the hub repository {name} has no {FILE_NAME}: it is not a profile")
        return downloaded
    raise ProfileNotFoundError(
        f"no profile {name!r}: give a folder, a hub repository (OWNER/NAME), or one of "
        f"{', '.join(sorted(shipped)) or '(none shipped)'}"
    )


def model_id(config: PretrainedConfig) -> str:
    """What a profile calls the model of `config`."""
    # A folder's name need not be UTF-8.
    return str(config.name_or_path or config.model_type).encode(errors="replace").decode()


def library_versions() -> dict[str, str]:
    """Of the libraries that a profile's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in ("confsteer", "torch", "transformers")}


def schema() -> dict[str, Any]:
    """JSON schema of ``profile.json``."""
    described = Profile.model_json_schema()
    described["properties"] = {
        "format_version": {"const": FORMAT_VERSION},
        **described["properties"],
        "checksum": {"type": "string", "description": "SHA-256 of the rest, keys sorted."},
    }
    described["required"] = ["format_version", *described["required"], "checksum"]
    return described


def _checksum(version: int, document: Mapping[str, Any]) -> str:
    canonical = json.dumps([version, document], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_document(file: Path) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ProfileCorruptError(f"{file} has a key twice")
        return dict(pairs)

    try:
        document = json.loads(read_at_most(file, MAX_BYTES), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ProfileCorruptError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise ProfileNotFoundError(f"cannot read {file}: {error.strerror}") from error
    if not isinstance(document, dict):
        raise ProfileCorruptError(f"{file} is not a JSON object")
    return document


def _read_columns(file: Path, profile: Profile) -> dict[str, Tensor]:
    try:
        payload = read_at_most(file, MAX_COLUMNS_BYTES)
    except OSError as error:
        raise ProfileCorruptError(f"cannot read {file}, which the profile names: {error.strerror}") from error
    if hashlib.sha256(payload).hexdigest() != profile.columns_file.sha256:
        raise ProfileCorruptError(f"{file} is truncated or was changed after it was written (its SHA-256 does not fit)")
    try:
        columns = safetensors.torch.load(payload)
    except (safetensors.SafetensorError, KeyError) as error:  # a KeyError of a data type that torch does not have
        raise ProfileCorruptError(f"{file} is not a safetensors file that can be read: {error}") from error
    for name in (*WEIGHT_COLUMNS, *(() if profile.corpus is None else MEASURED_COLUMNS)):
        if name not in columns:
            raise ProfileCorruptError(f"{file} has no column {name!r}")
    for name, column in columns.items():
        if column.dtype not in (torch.float32, torch.float64) or column.dim() != 1:
            raise ProfileCorruptError(
                f"{file}: {name} is {dtype_name(column.dtype)} {list(column.shape)}; a column is a row of float32 or float64"
            )
        if name != "singular_values" and len(column) != profile.model.n_neurons:
            raise ProfileCorruptError(f"{file}: {name} is of {len(column)} neurons, the layer has {profile.model.n_neurons}")
    spectrum = columns["singular_values"]
    if not (len(spectrum) > profile.layer.null_dims and spectrum.isfinite().all()):
        raise ProfileCorruptError(
            f"{file}: singular_values must be more numbers than the {profile.layer.null_dims} of the null space"
        )
    return columns
