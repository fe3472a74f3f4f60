"""The unigram distribution as a direction in logit space.

Source: Stolfo et al. 2024 (arXiv 2406.16254), section 4: a token-frequency neuron adds to every logit an amount
proportional to the token's log frequency.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from confsteer.errors import CorpusError


class Unigram(NamedTuple):
    """A corpus's unigram distribution over the vocabulary, float32."""

    frequency: Tensor
    """``p_freq``, ``[vocab]``."""
    log_frequency: Tensor
    """``log p_freq``, ``[vocab]``, with one count added to every token."""
    direction: Tensor
    """``v``: ``log p_freq`` less its mean, unit norm, ``[vocab]``."""
    length: float
    """Norm of the centred ``log p_freq``, so that ``log p_freq = length · v + constant``."""

    @classmethod
    def from_counts(cls, counts: Tensor) -> Unigram:
        """Make it from token counts ``[vocab]``.

        Raises:
            CorpusError: all tokens are equally frequent, so there is no direction.
            ValueError: a count is negative.
        """
        if (counts < 0).any():
            raise ValueError("token counts cannot be negative")
        smoothed = counts.double() + 1
        log_frequency = (smoothed / smoothed.sum()).log()
        centred = log_frequency - log_frequency.mean()
        length = float(centred.norm())
        if length < 1e-9:
            raise CorpusError("every token is equally frequent in the text: there is no unigram direction; give more text")
        return cls(log_frequency.exp().float(), log_frequency.float(), (centred / length).float(), length)
