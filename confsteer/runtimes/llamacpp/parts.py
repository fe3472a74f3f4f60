"""A steering in the two forms that llama.cpp has for it.

``a' = gain · a + bias`` on some neurons of the last MLP changes what the layer adds to the residual by

    Σ (gain − 1) · a · w  +  Σ bias · w

The second sum is a constant, and so it can be a control vector: llama.cpp adds that of the last layer right before the final
norm. The first is a change of the output projection: a LoRA with a rank per neuron. A norm on the MLP's output (Gemma 2 and 3,
OLMo 2) stands between the two places. Gains before it are still a LoRA. But a constant before it is not a constant after it. A
null direction is a constant after it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from confsteer.errors import SteeringError, UnsupportedModelError
from confsteer.model.checkpoint import LastLayer
from confsteer.profile.profile import Profile
from confsteer.runtimes.linear import linear_edit
from confsteer.steering import Steering

OWN_NAMES = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "mistral": "llama",
    "phi": "phi2",
}
"""Model type -> architecture in GGUF files, if the two names differ."""


class Parts(NamedTuple):
    """A steering of one model, in the parts that llama.cpp can hold."""

    steering: Steering
    """With its preset written out."""
    architecture: str
    """Name of the model's architecture in GGUF files."""
    layer: int
    """Index of the last layer."""
    constant: Tensor | None
    """Constant added to the residual after that layer, float64 ``[d_model]``. None if there is none."""
    normed: bool
    """Whether a part of it comes before a norm on the MLP's output. Then it is not a constant."""
    neurons: tuple[int, ...]
    """Indices of the neurons whose gain is not 1."""
    changes: Tensor
    """Changes of their output weights, ``(gain − 1) · w``, float64 ``[neurons, d_model]``."""
    n_neurons: int
    """Number of neurons in the layer."""

    @property
    def projection(self) -> str:
        """Name of the last MLP's output projection in a GGUF file."""
        return f"blk.{self.layer}.ffn_down.weight"


def split(steering: Steering, profile: Profile, last: LastLayer) -> Parts:
    """Split a steering into a constant and gains, with the output weights of the model at hand.

    Args:
        steering: whatever is linear.
        profile: of the model.
        last: the model's last layer, as it is on disk.

    Raises:
        SteeringError: the steering is malformed, out of reach, changes nothing, or is not linear.
        NoNeuronsError: the profile has no neurons to turn.
        ProfileMismatchError: the profile is of another model.
        UnsupportedModelError: llama.cpp's name for this kind of model is not known here.
    """
    steering = profile.resolve(steering)
    edit = linear_edit(steering, profile)
    profile.check_model(last.anatomy)
    architecture = _architecture(last)
    writes = last.anatomy.w_out()[edit.neurons]
    of_neurons = edit.constant(writes) * last.anatomy.residual_multiplier
    constant = of_neurons + edit.residual
    multiplied = edit.gain != 1
    if not (constant.any() or multiplied.any()):
        raise SteeringError(f"{steering}: changes nothing in this model; there is nothing to write")
    return Parts(
        steering=steering,
        architecture=architecture,
        layer=last.anatomy.layer,
        constant=constant if constant.any() else None,
        normed=last.anatomy.write_norm is not None and bool(of_neurons.any()),
        neurons=tuple(edit.neurons[multiplied].tolist()),
        changes=(edit.gain[multiplied] - 1)[:, None] * writes[multiplied].double(),
        n_neurons=last.anatomy.n_neurons,
    )


def _architecture(last: LastLayer) -> str:
    """Find the name of this kind of model in GGUF files.

    Raises:
        UnsupportedModelError: it is not known here.
    """
    if last.file is not None:
        return last.file.architecture
    from gguf import MODEL_ARCH_NAMES

    model_type = last.config.model_type
    name = OWN_NAMES.get(model_type, model_type)
    if name not in MODEL_ARCH_NAMES.values():
        raise UnsupportedModelError(
            f"{model_type}: llama.cpp's name for this kind of model is not known here. Give the GGUF file in place of the "
            "checkpoint"
        )
    return str(name)


def no_constant(steering: Steering, profile: Profile) -> SteeringError:
    """Make the error that says why a constant has no place in a model with a norm on the MLP's output."""
    model, neuron = profile.model, profile.steerable[0]
    cancelling = f"scale.{neuron.index}=0.5 shift.{neuron.index}={-0.5 * neuron.mean_activation!r}"
    return SteeringError(
        f"{steering}: adds a constant to the MLP's output of {model.id} ({model.model_type}), which a norm divides by its size, "
        "another for each token; llama.cpp adds control vectors after that norm, where it is no constant, and has no bias before "
        "it. What llama.cpp can do here multiplies activations, a scale whose constant a shift takes away, "
        f"{cancelling}; and the entropy dial alone as a constant after the norm, which confsteer export measures on a --text. "
        "Steer with anything else in transformers or vLLM"
    )
