"""Predictions of a text under any intervention at the last layer, in closed form.

The model runs over the text once. What it leaves at the input of the final norm, and the activations of the neurons that
steering can reach, decide every prediction that any steering of them, any temperature and any constant added to the residual
would have made (`confsteer.last_layer.readout`). So steerings are compared, and chosen by gradient, without running the model
again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.edit import NeuronEdit, edited
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

MIN_ROWS = 128
MAX_LOGITS = 2**20
"""Logits at a time (4 MiB in float32), but at least `MIN_ROWS` tokens: fewer would read the unembedding too often."""


class Intervention(NamedTuple):
    """A change at the last layer, as tensors that can be differentiated.

    Neurons become ``clip(gain · a + bias, low, high)``, a constant is written along the direction that the unembedding reads
    least, and the logits are divided by a temperature.
    """

    gain: Tensor
    """``[neurons]``, as the next three; in the order of `Profile.steerable`."""
    bias: Tensor
    low: Tensor
    high: Tensor
    null_write: Tensor
    """Length of the constant, in units of the residual, a scalar."""
    temperature: Tensor
    """A scalar."""

    @classmethod
    def neutral(cls, neurons: int) -> Intervention:
        """Nothing at all."""
        zeros, inf = torch.zeros(neurons), torch.full((neurons,), math.inf)
        return cls(torch.ones(neurons), zeros, -inf, inf, torch.zeros(()), torch.ones(()))

    @classmethod
    def of(cls, edit: NeuronEdit) -> Intervention:
        """A steering alone."""
        return cls.neutral(len(edit.gain))._replace(**{n: torch.from_numpy(c) for n, c in edit._asdict().items()})


class UnigramDivergences(NamedTuple):
    """How far each prediction is from the unigram distribution, nats, ``[tokens]`` each."""

    kl_model_unigram: Tensor
    """``KL(P_model ‖ P_freq)``"""
    kl_unigram_model: Tensor
    """``KL(P_freq ‖ P_model)``"""

    @classmethod
    def of(cls, log_p: Tensor, log_frequency: Tensor) -> UnigramDivergences:
        """From log-probabilities ``[tokens, vocab]`` and ``[vocab]``."""
        frequency = log_frequency.exp()
        model_unigram = (log_p.exp() * (log_p - log_frequency)).sum(dim=-1)
        return cls(model_unigram, frequency @ log_frequency - log_p @ frequency)

    @classmethod
    def join(cls, parts: list[UnigramDivergences]) -> UnigramDivergences:
        """Divergences of several stretches of tokens as one."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


class TextStates:
    """A text as the last layer saw it."""

    def __init__(self, readout: Readout, states: TokenStates, null_direction: Tensor) -> None:
        """
        Args:
            readout: the last layer, of the neurons that steering can reach.
            states: of the text, activations of these neurons.
            null_direction: unit vector that the unembedding reads least, ``[d_model]``.
        """
        self.readout, self.states, self.null_direction = readout, states, null_direction

    @property
    def tokens(self) -> int:
        return len(self.states.targets)

    def at(self, rows: Tensor) -> TextStates:
        """Some of the tokens, by index or by mask."""
        return TextStates(self.readout, self.states.at(rows), self.null_direction)

    def chunks(self) -> Iterator[TextStates]:
        """A few tokens at a time, in order, as slices."""
        step = max(MIN_ROWS, MAX_LOGITS // self.readout.vocab_size)
        for start in range(0, self.tokens, step):
            yield TextStates(self.readout, self.states.at(slice(start, start + step)), self.null_direction)

    def logits(self, intervention: Intervention) -> Tensor:
        """Logits ``[tokens, vocab]`` after an intervention; for texts of any length see `chunks`."""
        *edit, null_write, temperature = (column.to(self.null_direction.device) for column in intervention)
        activations = self.states.activations.float()
        state = self.readout.state(self.states.residual, self.states.mlp_output)
        residual = self.readout.residual_after(state, edited(activations, *edit) - activations)
        return self.readout.logits(residual + null_write * self.null_direction) / temperature

    @torch.no_grad()
    def scores(self, intervention: Intervention) -> TokenScores:
        """Score the prediction of each token."""
        parts = [TokenScores.of(chunk.logits(intervention), chunk.states.targets) for chunk in self.chunks()]
        return TokenScores(*(field.cpu() for field in TokenScores.join(parts)))

    @torch.no_grad()
    def scores_and_divergences(self, intervention: Intervention, unigram: Unigram) -> tuple[TokenScores, UnigramDivergences]:
        """Score the prediction of each token, and its distance from the unigram distribution."""
        log_frequency = unigram.log_frequency.to(self.null_direction.device)
        scores, divergences = [], []
        for chunk in self.chunks():
            log_p = chunk.logits(intervention).log_softmax(dim=-1)
            scores.append(TokenScores.of(log_p, chunk.states.targets))
            divergences.append(UnigramDivergences.of(log_p, log_frequency))
        joined = UnigramDivergences.join(divergences)
        return TokenScores(*(field.cpu() for field in TokenScores.join(scores))), UnigramDivergences(*(d.cpu() for d in joined))
