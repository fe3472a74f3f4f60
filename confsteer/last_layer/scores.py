"""Scores of a model's predictions of each next token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.readout import WORKING_SET, Readout
from confsteer.last_layer.unigram import Unigram

ARGMAX_BLOCK = 64
"""Logits in a block, in which the maximum is found first: torch finds a maximum ten times faster than its index."""


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
        """Score logits (or log-probabilities) ``[tokens, vocab]`` by the ids that came ``[tokens]``."""
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
        """Score inputs of the final norm ``[tokens, d_model]``, edited or not. No model runs, and logits are held in chunks."""
        step = max(1, WORKING_SET // readout.vocab_size)
        return cls.join(
            [cls.of(readout.logits(rows), ids) for rows, ids in zip(residual.split(step), targets.split(step), strict=True)]
        )

    @classmethod
    def join(cls, parts: list[TokenScores]) -> TokenScores:
        """Join the scores of several stretches of tokens."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def at(self, rows: Tensor) -> TokenScores:
        """The scores of some of the tokens."""
        return TokenScores(*(field[rows] for field in self))


class UnigramDivergences(NamedTuple):
    """Distances of each prediction from the unigram distribution, in nats, ``[tokens]`` each."""

    kl_model_unigram: Tensor
    """``KL(P_model ‖ P_freq)``"""
    kl_unigram_model: Tensor
    """``KL(P_freq ‖ P_model)``"""


class Predictions:
    """Scores of a text's predictions, filled in a few tokens at a time."""

    def __init__(self, tokens: int, device: torch.device, unigram: Unigram | None) -> None:
        """
        Args:
            tokens: how many there are.
            device: where the logits are.
            unigram: the distribution that divergences are measured from. Without one, none are computed.
        """
        self._log_frequency = self._frequency = None
        if unigram is not None:
            self._log_frequency = unigram.log_frequency.to(device)
            self._frequency = self._log_frequency.exp()
            self._negative_entropy = float(self._frequency.double() @ self._log_frequency.double())
        self._floats = torch.empty(5, tokens, device=device)
        self._prediction = torch.empty(tokens, dtype=torch.long, device=device)
        self._correct = torch.empty(tokens, dtype=torch.bool, device=device)

    def fill(self, rows: slice, logits: Tensor, targets: Tensor) -> None:
        """Score some of the tokens.

        Few passes over the vocabulary: the largest logit, the probabilities, and three weighted sums.

        Args:
            rows: which they are.
            logits: ``[rows, vocab]``; written over.
            targets: ids that came, ``[rows]``.
        """
        top, prediction = largest(logits)
        # Subtract the largest: large logits, as at a low temperature, would cancel each other with few digits left.
        logits -= top[:, None]
        p = logits.softmax(dim=-1)
        confidence = p.gather(1, prediction[:, None])[:, 0]
        log_sum = -confidence.log()
        entropy = log_sum - torch.linalg.vecdot(p, logits)
        columns = [log_sum - logits.gather(1, targets[:, None])[:, 0], entropy, confidence]
        if self._log_frequency is not None and self._frequency is not None:
            # Use a dot product: it keeps more partial sums than a matrix product, and loses fewer digits over a vocabulary.
            cross = torch.linalg.vecdot(p, self._log_frequency)
            mean = torch.linalg.vecdot(logits, self._frequency)
            columns += [-entropy - cross, self._negative_entropy - mean + log_sum]
        torch.stack(columns, out=self._floats[: len(columns), rows])
        self._prediction[rows] = prediction
        self._correct[rows] = prediction == targets

    @property
    def scores(self) -> TokenScores:
        """The scores, on the CPU."""
        nll, entropy, confidence = self._floats[:3].cpu()
        return TokenScores(nll, entropy, confidence.clamp_max(1.0), self._prediction.cpu(), self._correct.cpu())

    @property
    def divergences(self) -> UnigramDivergences:
        """The distances from the unigram distribution, on the CPU."""
        if self._frequency is None:
            raise ValueError("there is no unigram distribution to be far from: give one")
        return UnigramDivergences(*self._floats[3:].cpu())


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest of each row and its index, ``[rows]`` each, of logits ``[rows, vocab]``; the first of equals."""
    even = logits.shape[1] // ARGMAX_BLOCK * ARGMAX_BLOCK
    if even < ARGMAX_BLOCK**2:
        return logits.max(dim=-1)
    blocks = logits[:, :even].unflatten(1, (-1, ARGMAX_BLOCK))
    block = blocks.amax(dim=-1).argmax(dim=-1)
    top, within = blocks[torch.arange(len(logits), device=logits.device), block].max(dim=-1)
    index = block * ARGMAX_BLOCK + within
    if even == logits.shape[1]:
        return top, index
    last, within = logits[:, even:].max(dim=-1)
    return torch.maximum(top, last), torch.where(last > top, even + within, index)
