"""The fields of ``profile.json``. ``calibrations/profile.schema.json`` is made from them."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from confsteer.last_layer.experts import Experts
from confsteer.model.anatomy import Anatomy
from confsteer.model.layers import dtype_name
from confsteer.steering import EXPERT_NEURON, Dial, NeuronKey
from confsteer.text.windows import vocabulary_size

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
NonNegative = Annotated[float, Field(ge=0)]
# Stop at the first wrong item: each further one would be a line of the error, and there may be very many.
CurveColumn = Annotated[tuple[float, ...], FailFast()]
SPARSE = ("experts", "name", "active", "null_direction")
"""Fields that few profiles have: those of mixtures of experts, and of a dial made by hand."""


class Strict(BaseModel):
    """A frozen record that refuses other types, unknown keys and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Sparse(Strict):
    """A record with fields that few profiles have. They are written only where they have a value."""

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if value is not None or name not in SPARSE}


class Measurement(Strict):
    """A mean over the corpus's tokens with its standard error over windows."""

    value: float
    standard_error: NonNegative | None
    """None if the corpus was a single window."""


class Neuron(Sparse):
    """A neuron of the last MLP. Effects are those of setting it to its mean activation, in nats, averaged over all tokens.

    A neuron of an expert has an activation only on tokens that are routed to the expert: its own activation times the routing
    weight. On other tokens it cannot be changed, and has no effect.
    """

    layer: Annotated[int, Field(ge=0)]
    index: Annotated[int, Field(ge=0)]
    """Number of the neuron in the layer, and its row in the columns."""
    name: Annotated[str, Field(pattern=EXPERT_NEURON)] | None = None
    """Expert and number within it, such as 3.17 or shared.17. This and the next are for a mixture of experts."""
    active: Fraction | None = None
    """Share of the tokens that are routed to its expert. An effect divided by it is the mean over these tokens."""
    sign: Literal[-1, 0, 1]
    """Direction in which its activation moves when its dial goes up. 0: its effect has no clear sign, and no dial moves it."""
    norm: NonNegative
    norm_percentile: Percent
    """Percentile within the layer, as are all percentiles."""
    logit_variance: NonNegative
    logit_variance_percentile: Percent
    null_fraction: Fraction
    """Share of its write in the unembedding's effective null space."""
    mean_activation: float
    """Mean over the tokens that it is active on; so is the next."""
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
    entropy_norm: Measurement | None = None
    """Part of mean Δentropy that goes through the final norm. The parts add up to the whole. This and the next three are None in
    older profiles."""
    entropy_write_norm: Measurement | None = None
    """Part that goes through the norm on the MLP's output. 0 in a model without one."""
    entropy_straight: Measurement | None = None
    """Part that goes straight to the logits."""
    norm_share: Measurement | None = None
    """Mean |part through the final norm| over the sum of that and of mean |part straight to the logits|."""
    frequency_effect: Measurement
    """Mean |ΔKL(P_freq ‖ P_model)|."""
    frequency_mediation: Measurement
    """1 − (mean |Δloss| with the logits held along the unigram direction)/total."""
    frequency_cosine: Annotated[float, Field(ge=-1, le=1)]
    """Cosine of its write to the logits with the unigram direction."""
    argmax_changed: Fraction
    """Share of tokens whose most likely next token changes."""
    total_effect_uncapped: Measurement | None = None
    """Mean |Δloss| of the logits before the model's softcap. This and the next are None in models without one."""
    entropy_effect_abs_uncapped: Measurement | None = None
    """Mean |Δentropy| before the softcap."""

    @property
    def key(self) -> NeuronKey:
        """Name of the neuron in a steering and in reports: its index, or its name in a mixture of experts."""
        return self.index if self.name is None else self.name


class NullDirection(Strict):
    """An entropy neuron made by hand, not found: a constant along the direction that the unembedding reads least.

    The entropy dial adds position · push · direction to the residual of every token. It does so right before the final norm,
    after a norm on the MLP's output. The direction, of length 1, is the column ``null_direction``. The entropy rises along it.
    """

    singular_value: NonNegative
    """Its singular value in the folded unembedding: the smallest one."""
    push: Annotated[float, Field(gt=0)]
    """Length of the vector that position 1 adds."""
    residual_norm: Annotated[float, Field(gt=0)]
    """Mean length of the residual there. This and the next are over some tokens of the texts."""
    residual_along: float
    """Mean component of the residual along it. About this much can be taken away to lower the entropy."""

    def __str__(self) -> str:
        """Describe it in a sentence."""
        return (
            "No neuron of the model: a constant before the final norm, along the direction that the unembedding reads least "
            f"(singular value {self.singular_value:.3g}). Position 1 adds {self.push:.3g}; the residual has a mean length of "
            f"{self.residual_norm:.3g}, and {self.residual_along:+.3g} along it."
        )


class Response(Strict):
    """Response to one dial: means over a text at each of the dial's positions, in nats. A long text is sampled evenly.

    With several texts, it is the mean of their means.
    """

    position: CurveColumn
    """Dial positions, ascending, with 0 among them. Each neuron is pushed by position · sign · its standard deviation, and a
    null direction by position · its push."""
    entropy: CurveColumn
    kl_model_unigram: CurveColumn
    """KL(P_model ‖ P_freq)"""
    kl_unigram_model: CurveColumn
    """KL(P_freq ‖ P_model)"""
    loss: CurveColumn
    argmax_changed: Annotated[tuple[Fraction, ...], FailFast()]
    temperature: Annotated[tuple[Annotated[float, Field(gt=0)] | None, ...], FailFast()] = ()
    """Temperature at which the unsteered model has this mean entropy on the same tokens. None where it is below 1/4 or above 4.
    Empty in older profiles."""

    @model_validator(mode="after")
    def _is_a_curve(self) -> Response:
        columns = {
            name: len(getattr(self, name)) for name in type(self).model_fields if name != "temperature" or self.temperature
        }
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
        """Compute the effect of each position in the units of `dial`, in nats, relative to position 0.

        ``entropy``: change of the mean entropy. ``unigram``: how much closer to the unigram distribution the output comes.
        """
        values = self.entropy if dial == "entropy" else tuple(-kl for kl in self.kl_model_unigram)
        return tuple(value - values[self.zero] for value in values)


class ModelIdentity(Sparse):
    """The model that a profile belongs to."""

    id: str
    """Hub id or folder that it was loaded from."""
    revision: str | None
    """Commit on the hub, if it is from there."""
    model_type: str
    layer: Annotated[int, Field(ge=0)]
    n_neurons: Annotated[int, Field(gt=0)]
    """Number of neurons of the last MLP, of all experts together in a mixture."""
    experts: Experts | None = None
    """Sizes of a mixture of experts."""
    d_model: Annotated[int, Field(gt=0)]
    vocab_size: Annotated[int, Field(gt=0)]
    """Rows of the unembedding, padding included."""
    tokenizer_size: Annotated[int, Field(gt=0)]
    """Rows that the tokenizer has ids for. The others are left out of every statistic."""
    dtype: str
    """Precision in which it was calibrated."""
    fingerprints: dict[str, Sha256]
    """SHA-256 of the unembedding and the last projection, rounded to each precision."""

    @model_validator(mode="after")
    def _counts_its_experts(self) -> ModelIdentity:
        if self.experts is not None and self.experts.n_neurons != self.n_neurons:
            raise ValueError(f"{self.n_neurons} neurons, and experts of {self.experts.n_neurons}")
        return self

    def key(self, neuron: int) -> NeuronKey:
        """Name a neuron by its index as `Neuron.key` does."""
        return neuron if self.experts is None else self.experts.name(neuron)

    @classmethod
    def of(
        cls, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, anatomy: Anatomy, *, revision: str | None = None
    ) -> ModelIdentity:
        """Identify the model that these belong to."""
        return cls(
            id=model_id(config),
            revision=revision,
            model_type=config.model_type,
            layer=anatomy.layer,
            n_neurons=anatomy.n_neurons,
            experts=anatomy.experts,
            d_model=anatomy.d_model,
            vocab_size=anatomy.vocab_size,
            tokenizer_size=min(vocabulary_size(tokenizer), anatomy.vocab_size),
            dtype=dtype_name(anatomy.dtype),
            fingerprints=anatomy.fingerprints(),
        )


class CorpusIdentity(Strict):
    """The text that a profile was calibrated on."""

    source: str
    sha256: Sha256
    """SHA-256 of the token ids and of the starts of the windows."""
    tokens: Annotated[int, Field(gt=0)]
    kept_tokens: Annotated[int, Field(gt=0)]
    """Tokens that count. Left out are the first positions and the last of each window, BOS, EOS and the token after these."""
    windows: Annotated[int, Field(gt=0)]
    window: Annotated[int, Field(gt=0)]
    """Tokens per window."""
    unigram_tokens: Annotated[int, Field(ge=0)]
    """Tokens that the unigram distribution was counted on: those of the text, or of the given counts."""
    unigram_sha256: Sha256
    """SHA-256 of the counts."""


class OtherNullSpace(Strict):
    """Entropy neurons with another number of directions counted as the null space."""

    null_dims: Annotated[int, Field(gt=0)]
    entropy_neurons: tuple[Annotated[int, Field(ge=0)], ...]


class Layer(Strict):
    """Layer-wide baselines: chance levels, unsteered entropy and loss."""

    null_dims: Annotated[int, Field(gt=0)]
    """Directions counted as the unembedding's effective null space."""
    cliff: Annotated[float, Field(ge=1)] | None = None
    """Smallest singular value outside the null space over the largest inside. None where that is 0, and in older profiles."""
    other_null_spaces: tuple[OtherNullSpace, ...] = ()
    """Selection with half as many, and with twice as many, directions."""
    chance_null_fraction: Fraction
    """Null fraction that the largest of as many random directions as neurons exceeds 1 time in 20."""
    chance_frequency_cosine: Fraction | None
    """The same for the cosine with the unigram direction. This and the following fields are None without a corpus."""
    entropy: NonNegative | None
    """Mean output entropy of the unsteered model on the corpus, in nats."""
    loss: NonNegative | None
    """Mean next-token loss of the unsteered model on the corpus, in nats."""


class ColumnsFile(Strict):
    """The safetensors file with the statistics of every neuron of the layer."""

    file: Annotated[str, Field(pattern=r"^columns-[0-9a-f]{12}\.safetensors$")]
    sha256: Sha256


def model_id(config: PretrainedConfig) -> str:
    """Name the model of `config` as profiles name it."""
    # Replace what is not UTF-8: a folder may have any name.
    return str(config.name_or_path or config.model_type).encode(errors="replace").decode()


def library_versions() -> dict[str, str]:
    """Look up the versions of the libraries that a profile's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in ("confsteer", "torch", "transformers")}
