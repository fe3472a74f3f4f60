"""Texts that a model reads once, for any number of interventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from confsteer.bars import progress_bar
from confsteer.discovery.weights import unembedding_spectrum
from confsteer.errors import SteeringError
from confsteer.last_layer.coordinates import Writes
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.text_states import TextStates
from confsteer.model.dissect import dissect
from confsteer.model.states import record
from confsteer.profile.profile import Profile
from confsteer.profile.store import DIRECTION_COLUMN
from confsteer.steering import Steering
from confsteer.text.windows import Windows, check_context


def interventions_of(steerings: Sequence[Steering], profile: Profile) -> tuple[list[Steering], list[Intervention]]:
    """Write out the presets of steerings, and compute the intervention of each at the last layer.

    Raises:
        SteeringError: one cannot be applied, or not in an evaluation.
    """
    resolved = [profile.resolve(steering) for steering in steerings]
    for steering in resolved:
        if steering.positions != "all":
            raise SteeringError(f"{steering}: an evaluation scores text that is given, and steers every position of it")
    return resolved, [profile.intervention(steering) for steering in resolved]


class Reader:
    """Reader of texts with one model. What all texts share is made once."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, profile: Profile) -> None:
        """Prepare what all texts share.

        Args:
            model: the profile's model. It is put in evaluation mode.
            profile: profile with the neurons that steering can reach.

        Raises:
            NoNeuronsError: the profile has no neurons to steer.
            ProfileMismatchError: it is of another model.
            UnsupportedModelError: see `confsteer.model.dissect`.
        """
        model.eval()
        neurons = torch.tensor([neuron.index for neuron in profile.steerable], dtype=torch.long)
        self.model, self.profile, self.anatomy = model, profile, dissect(model)
        profile.check_model(self.anatomy)
        self.readout = self.anatomy.readout(profile.model.tokenizer_size, neurons)
        self.device = self.readout.unembedding.device
        self.neurons = neurons.to(self.device)
        if profile.null_direction is None:
            self._null_direction = unembedding_spectrum(self.readout).directions[:, 0].float()
        else:
            self._null_direction = profile.columns[DIRECTION_COLUMN].to(self.device).float()
        self._writes = Writes(self.readout, self._null_direction)

    @torch.no_grad()
    def read(self, windows: Windows, *, progress: bool = False) -> TextStates:
        """Run the model over a text once, and keep the states that decide its predictions: ``d_model`` numbers a token.

        In half precision the model rounds its logits, but this does not. Predictions are computed in float32 from the final norm
        on, with the same weights.

        Args:
            windows: the text.
            progress: whether to show a progress bar.

        Raises:
            SettingError: the windows are longer than the model's context.
            CorpusError: no token of the text counts.
            SteeringError, UnsupportedModelError: see `confsteer.model.states.check_closed_form`.
        """
        check_context(windows.window, self.model.config)
        windows.check_counted()
        label = f"read {windows.source}"
        with progress_bar(label, windows.n_tokens, show=progress) as bar:
            states = record(self.model, self.anatomy, windows, self.neurons, self.device, bar.update, self.readout)
            return self.reading(states)

    def reading(self, states: TokenStates) -> TextStates:
        """Join the readout to states of some tokens, with the activations of `neurons`."""
        return TextStates(self.readout, states, self._null_direction, self._writes)
