"""A text's predictions on a sample of the vocabulary, for fits and searches: a hundred times smaller than the whole.

For each token the likeliest ids are kept as they are. The others are drawn at random. Their chances grow with the square root
of their probability. They are weighted so that sums over the vocabulary are right on average, and their total probability
exactly. Whatever is done to the logits is done to the sample: ``log Σ_v exp y_v ≈ log Σ_s exp(y_s + log_weight_s)``.

The error is random and independent from token to token. The error of a mean over a text falls with the square root of the
number of tokens. No reported number is computed from a sample. Fitted numbers are, but their effect is then computed over the
whole vocabulary.

Source: systematic sampling with unequal probabilities, Madow 1949 (Annals of Mathematical Statistics 20).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.coordinates import Coordinates, Writes
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.states import rows_of

LIKELIEST, DRAWN = 512, 512
"""Ids kept and drawn for each token."""
MAX_ENTRIES = 2**23
"""Most entries for a text, 12 bytes each. In a long text each token has fewer ids, but not below `MIN_OF_EACH`."""
MIN_OF_EACH = 64
MULTIPLIED = 16
"""Vocabularies up to this many times the sample are multiplied whole: that is faster than looking up every write."""
TILTS = (0.25, 4.0)
"""Range of the factors that correct the weights of drawn ids to make their mean logit right."""
SMALLEST_TAIL = 1e-9
"""Least probability of all but the likeliest ids together. Below it they are left out."""


class SampledLogits(NamedTuple):
    """Logits of some tokens on their sample, after an intervention."""

    logits: Tensor
    """``[tokens, sampled + 1]``; the last column is the token that came."""
    log_weight: Tensor
    """Logarithm of how many ids each stands for, shaped as `logits`; −∞ for the token that came."""
    ids: Tensor
    """Ids, int32, shaped as `logits`."""

    @property
    def of_target(self) -> Tensor:
        """Logit of the token that came, ``[tokens]``."""
        return self.logits[:, -1]

    @property
    def log_sum(self) -> Tensor:
        """Logarithm of the sum of all exponentials, ``[tokens]``."""
        return (self.logits + self.log_weight).logsumexp(dim=-1)

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """Find the largest logit and its id, ``[tokens]`` each."""
        top, index = self.logits.max(dim=-1)
        return top, self.ids.gather(1, index[:, None])[:, 0].long()

    @property
    def scores(self) -> TokenScores:
        """Scores of the predictions."""
        log_sum, p = self.log_sum, (self.logits + self.log_weight).softmax(dim=-1)
        top, prediction = self.likeliest()
        return TokenScores(
            nll=log_sum - self.of_target,
            entropy=log_sum - torch.linalg.vecdot(p, self.logits),
            confidence=(top - log_sum).exp().clamp_max(1.0),
            prediction=prediction,
            correct=prediction == self.ids[:, -1],
        )


class VocabularySample(NamedTuple):
    """Ids sampled for each token of a text, and the unsteered logits there."""

    own: Tensor
    """Logits along the token's own directions, ``[tokens, K, sampled + 1]``; the last column is the token that came."""
    ids: Tensor
    """``[tokens, sampled + 1]``, int32."""
    log_weight: Tensor
    """See `SampledLogits.log_weight`."""

    @classmethod
    def empty(cls, tokens: int, readout: Readout) -> VocabularySample:
        """Make room for the sample of a text."""
        each = max(MIN_OF_EACH, min(LIKELIEST, DRAWN, MAX_ENTRIES // (2 * max(1, tokens))))
        # Take a vocabulary whole if it is not larger than the sample.
        size = min(readout.vocab_size, 2 * each) + 1
        own, device = 1 if readout.write_norm is None else 2, readout.unembedding.device
        log_weight = torch.zeros(tokens, size, device=device)
        log_weight[:, -1] = -math.inf
        return cls(
            own=torch.empty(tokens, own, size, device=device),
            ids=torch.empty(tokens, size, dtype=torch.int32, device=device),
            log_weight=log_weight,
        )

    def at(self, rows: slice | Tensor) -> VocabularySample:
        """The sample of some of the tokens."""
        return rows_of(self, rows)

    def draw(self, rows: slice, x: Tensor, logits: Tensor, targets: Tensor, start: Tensor) -> None:
        """Draw the sample of some of the tokens.

        Args:
            rows: which they are.
            x: logits along their own directions, ``[K, rows, vocab]``.
            logits: unsteered, ``[rows, vocab]``.
            targets: ids that came, ``[rows]``.
            start: a random number in [0, 1) for each, ``[rows]``.
        """
        size = self.ids.shape[1] - 1
        if size == logits.shape[1]:
            ids = torch.arange(size, device=x.device).expand(len(targets), size)
        else:
            ids, self.log_weight[rows, :-1] = _draw(logits, size, start)
        ids = torch.cat([ids, targets[:, None]], dim=1)
        self.ids[rows] = ids
        self.own[rows] = x.gather(2, ids.expand(len(x), *ids.shape)).transpose(0, 1)

    def logits(self, readout: Readout, writes: Writes, coordinates: Coordinates) -> SampledLogits:
        """Compute the logits after an intervention, differentiable with respect to its coordinates.

        Args:
            readout: the last layer.
            writes: what can be added to the residual.
            coordinates: of the intervention at these tokens.
        """
        own = coordinates.own
        y = own[:, -1:] * self.own[:, -1]
        for k in range(1, own.shape[1]):
            y = torch.addcmul(y, own[:, -1 - k, None], self.own[:, -1 - k])
        if coordinates.neurons is not None:
            write = coordinates.write(writes)
            if readout.vocab_size <= MULTIPLIED * self.ids.shape[1]:
                y = y + (write @ writes.logits).gather(1, self.ids.long())
            else:
                y = y + (torch.nn.functional.embedding(self.ids, writes.by_token) @ write[:, :, None])[:, :, 0]
        elif coordinates.null is not None:
            y = torch.addcmul(y, coordinates.null[:, None], writes.logits[-1][self.ids])
        if readout.biased:
            y = y + readout.logit_bias[self.ids]
        return SampledLogits(readout.cap(y) * coordinates.cooling[:, None], self.log_weight, self.ids)


def _draw(logits: Tensor, size: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Choose ids and their weights' logarithms, ``[rows, size]`` each, of logits ``[rows, vocab]``."""
    kept = size // 2
    drawn = size - kept
    p = logits.softmax(dim=-1)
    likeliest = logits.topk(kept, dim=-1, sorted=False).indices
    p.scatter_(1, likeliest, 0)
    tail = p.sum(dim=-1, keepdim=True)
    mean = torch.linalg.vecdot(p, logits)[:, None] / tail
    # Step through the cumulated chances in equal strides from a random start.
    chance = p.sqrt_()
    cumulated = chance.cumsum(dim=-1)
    total = cumulated[:, -1:]
    strides = (start[:, None] + torch.arange(drawn, device=p.device)) / drawn * total
    ids = torch.searchsorted(cumulated, strides, right=True).clamp_max(logits.shape[1] - 1)
    # Weight each by one over its chance. Then tilt the weights, so that the total probability and the mean logit are exact.
    chance, logit = chance.gather(1, ids), logits.gather(1, ids)
    share = chance / chance.sum(dim=-1, keepdim=True)
    deviation = logit - (share * logit).sum(dim=-1, keepdim=True)
    tilt = (mean - logit + deviation) / (share * deviation.square()).sum(dim=-1, keepdim=True)
    share = share * (1 + tilt * deviation).clamp(*TILTS)
    log_weight = (tail * share / share.sum(dim=-1, keepdim=True)).log() - 2 * chance.log()
    log_weight = torch.where(tail > SMALLEST_TAIL, log_weight, -math.inf).nan_to_num(nan=-math.inf, posinf=-math.inf)
    return torch.cat([likeliest, ids], dim=1), torch.cat([torch.zeros_like(likeliest, dtype=torch.float32), log_weight], dim=1)
