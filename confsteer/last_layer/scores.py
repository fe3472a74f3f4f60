"""Scores of a model's predictions of each next token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.readout import WORKING_SET, Readout


class TokenScores(NamedTuple):
    """Scores of each next-token prediction, ``[tokens]``."""

    nll: Tensor
    """Negative log-likelihood of the token that came, in nats."""
    entropy: Tensor
    """Entropy of the predicted distribution, in nats."""
    confidence: Tensor
    """Probability of the most likely token."""
    prediction: Tensor
    """Id of the most likely token."""
    correct: Tensor
    """Whether the most likely token came."""

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> TokenScores:
        """From logits (or log-probabilities) ``[tokens, vocab]`` and the ids that came ``[tokens]``."""
        log_p = logits.float().log_softmax(dim=-1)
        top, prediction = log_p.max(dim=-1)
        return cls(
            nll=-log_p.gather(1, targets[:, None])[:, 0],
            entropy=-(log_p.exp() * log_p).sum(dim=-1),
            confidence=top.exp().clamp_max(1.0),
            prediction=prediction,
            correct=prediction == targets,
        )

    @classmethod
    def of_residual(cls, readout: Readout, residual: Tensor, targets: Tensor) -> TokenScores:
        """From inputs of the final norm ``[tokens, d_model]``, edited ones too: no model runs, logits are held in chunks."""
        step = max(1, WORKING_SET // readout.vocab_size)
        return cls.join(
            [cls.of(readout.logits(rows), ids) for rows, ids in zip(residual.split(step), targets.split(step), strict=True)]
        )

    @classmethod
    def join(cls, parts: list[TokenScores]) -> TokenScores:
        """Scores of several stretches of tokens as one."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def at(self, rows: Tensor) -> TokenScores:
        """The scores of some of the tokens."""
        return TokenScores(*(field[rows] for field in self))
