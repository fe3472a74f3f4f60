"""The entropy dial as a constant after the norm on the MLP's output, for models that have one (Gemma 2 and 3).

The neurons push before that norm, and llama.cpp adds control vectors after it. The norm turns one push into a different vector
for each token. The same direction after the norm is ``Σ sign · std · g ⊙ w`` with the norm's gain ``g``. As a constant it is a
dial too: most of its effect goes through the final norm, as with the neurons. But it is another dial. So its curve is measured
here on a text, by the closed form.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from confsteer.discovery.response import ResponseCurve, choose_positions, dial_change, monotone_range
from confsteer.errors import CorpusError, SteeringError, UnsupportedModelError
from confsteer.last_layer.readout import FullOutputs
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram
from confsteer.model.dissect import dissect
from confsteer.model.states import record
from confsteer.profile.profile import Profile
from confsteer.text.windows import Windows, check_context

CHOSEN_ON = 128
"""Tokens on which the positions of the curve are chosen."""


class Setting(NamedTuple):
    """A setting of the dial after the norm."""

    constant: Tensor
    """Constant added to the residual, float64 ``[d_model]``."""
    halves: tuple[float, float]
    """Change of the mean entropy that it makes on each half of the text, in nats. Their mean is what was asked for."""


class DialAfterNorm(NamedTuple):
    """A dial that adds a constant after the norm, with its curve."""

    unit: Tensor
    """Constant added to the residual at position 1, float64 ``[d_model]``."""
    position: tuple[float, ...]
    """Positions that were measured, ascending, with 0 among them."""
    changes: tuple[tuple[float, ...], tuple[float, ...]]
    """Change of the mean entropy at each position on each half of the text, in nats."""
    source: str
    """Text that it was measured on."""
    tokens: int
    """Number of its tokens that count."""

    def at(self, change: float) -> Setting:
        """Look up the setting that makes a given mean change over the halves.

        Raises:
            SteeringError: it is out of reach.
        """
        mean = np.mean(self.changes, axis=0)
        low, high = monotone_range(mean.tolist(), self.position.index(0.0))
        if not mean[low] <= change <= mean[high]:
            raise SteeringError(
                f"entropy={change:+g} is out of reach after the norm: on {self.source} a constant there goes from "
                f"{mean[low]:+.3f} to {mean[high]:+.3f} nats"
            )
        position = float(np.interp(change, mean[low : high + 1], self.position[low : high + 1]))
        first, second = (float(np.interp(position, self.position, one)) for one in self.changes)
        return Setting(position * self.unit, (first, second))


@torch.no_grad()
def dial_after_norm(model: PreTrainedModel, windows: Windows, profile: Profile) -> DialAfterNorm:
    """Measure the effect of the entropy dial as a constant after the norm.

    Args:
        model: the profile's model. It is put in evaluation mode.
        windows: a text like those that will be generated.
        profile: profile of a model with a norm on the MLP's output.

    Raises:
        NoNeuronsError: the profile has no entropy dial.
        UnsupportedModelError: the model has no such norm, so the constant is exact without a measurement.
        CorpusError: the text has fewer than two windows.
        ProfileMismatchError: the profile is of another model.
    """
    profile.require_neurons("entropy")
    check_context(windows.window, model.config)
    model.eval()
    anatomy = dissect(model)
    profile.check_model(anatomy)
    if anatomy.write_norm is None:
        raise UnsupportedModelError(
            f"{profile.model.id} has no norm on the MLP's output: there a control vector is the dial itself, without a text"
        )
    if len(windows) < 2:
        raise CorpusError(f"{windows.source} is a single window: there is no second half to compare with. Give more text")
    readout = anatomy.readout(profile.model.tokenizer_size)
    # Drop the norm from the readout: the neurons' writes without it are the constant.
    constant = dataclasses.replace(readout, write_norm=None)
    device = readout.unembedding.device
    push = torch.zeros(readout.n_neurons, device=device)
    for neuron in profile.entropy_neurons:
        push[neuron.index] = neuron.sign * neuron.std_activation
    states = record(model, anatomy, windows, torch.tensor([], dtype=torch.int64), device, readout=readout)
    states = states._replace(mlp_output=None)
    unigram = Unigram.from_counts(windows.counts(readout.vocab_size).to(device))
    few = states.at(slice(None, None, max(1, len(states.targets) // CHOSEN_ON)))
    positions = choose_positions(constant, push, unigram, few, dial="entropy")

    def changes(half: TokenStates) -> tuple[float, ...]:
        curve = ResponseCurve(constant, push, unigram, positions)
        for outputs, _ in FullOutputs.stream(constant, half):
            curve.update(outputs)
        return tuple(dial_change(curve.result(), "entropy").tolist())

    in_first = states.window < len(windows) // 2
    return DialAfterNorm(
        unit=(push.double() @ readout.w_out.double()).cpu(),
        position=tuple(positions.tolist()),
        changes=(changes(states.at(in_first)), changes(states.at(~in_first))),
        source=windows.source,
        tokens=len(states.targets),
    )
