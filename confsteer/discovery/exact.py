"""Exact effects of a few neurons at every token, over the whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.exponentials import sum_exponentials
from confsteer.discovery.series import Series, applies_to
from confsteer.discovery.token_effects import Sums, TokenEffects, TokenSlopes
from confsteer.last_layer.cores import Scratch, on_all_cores
from confsteer.last_layer.readout import FullOutputs, Move, Readout
from confsteer.last_layer.states import rows_of
from confsteer.last_layer.unigram import Unigram

FEWEST_TOKENS, MOST_TOKENS = 16, 512
"""Number of tokens at a time below which exponentials are faster than the series, and above which it takes only more memory."""


class ExactEffects(NamedTuple):
    """Effects of ablating a few neurons, and the unsteered output."""

    effects: TokenEffects
    slopes: TokenSlopes
    argmax_changed: Tensor
    """Whether the most likely next token changes, bool ``[tokens, n_neurons]``."""
    entropy: Tensor
    """Entropy of the unsteered output, in nats, ``[tokens]``."""
    loss: Tensor
    """Loss of the unsteered output, in nats, ``[tokens]``."""

    @classmethod
    def of_no_tokens(cls, n_neurons: int, device: torch.device) -> ExactEffects:
        """Make the effects of some neurons at no token."""
        none = torch.empty(0, n_neurons, device=device)
        effects, slopes = TokenEffects(*[none] * len(TokenEffects._fields)), TokenSlopes(*[none] * len(TokenSlopes._fields))
        return cls(effects, slopes, none.bool(), none[:, 0], none[:, 0])


class ExactAblation:
    """Ablation of each of a few neurons alone. It keeps their writes to the logits, ``[n_neurons, vocab]``."""

    def __init__(self, readout: Readout, unigram: Unigram) -> None:
        """
        Args:
            readout: the model's last layer, of these neurons only.
            unigram: the corpus's unigram distribution.
        """
        self._readout, self._unigram = readout, unigram
        self._u = readout.w_out @ readout.unembedding.T
        self._series = Series(readout, self._u, unigram) if len(self._u) and applies_to(readout) else None

    def effects(self, outputs: FullOutputs, delta: Tensor) -> ExactEffects:
        """Compute the effects of adding ``delta`` ``[tokens, n_neurons]`` to each activation alone."""
        moves = self._readout.move(outputs.state, delta)
        sums, slopes = Sums.empty(delta, len(moves.write)), TokenSlopes.empty(delta)
        if self._series is None or len(delta) < FEWEST_TOKENS:
            self._sum_exponentials(outputs, moves, sums, slopes)
        else:
            for first in range(0, len(delta), MOST_TOKENS):
                rows = slice(first, first + MOST_TOKENS)
                here = outputs.at(rows), moves.at(slice(None), rows), rows_of(sums, rows)
                self._replace(*here, ~self._series.sum(*here, rows_of(slopes, rows)))
        effects = sums.effects(self._unigram.direction[outputs.targets, None])
        return ExactEffects(effects, slopes, sums.argmax_changed, *sums.of_output.unbind(dim=1))

    def _sum_exponentials(self, outputs: FullOutputs, moves: Move, sums: Sums, slopes: TokenSlopes) -> None:
        readout, scratch = self._readout, Scratch(outputs.y)

        def add_up(rows: slice) -> None:
            here, into = moves.at(slice(None), rows), rows_of(sums, rows)
            sum_exponentials(readout, outputs.at(rows), self._u, self._unigram, here, into, rows_of(slopes, rows), scratch)

        # Take few tokens, so that they by the vocabulary stay in the cache.
        on_all_cores(add_up, readout.blocks(len(outputs.y), readout.vocab_size), outputs.y.device)

    def _replace(self, outputs: FullOutputs, moves: Move, sums: Sums, pairs: Tensor) -> None:
        """Replace the sums of some pairs, bool ``[tokens, n_neurons]``, by those of exponentials."""
        readout, scratch = self._readout, Scratch(outputs.y)

        def replace(block: tuple[slice, Tensor]) -> None:
            neurons, rows = block
            here = moves.at(slice(None), rows, neurons)
            own = Sums.empty(here.write[0], len(here.write))
            sum_exponentials(readout.select(neurons), outputs.at(rows), self._u[neurons], self._unigram, here, own, None, scratch)
            sums.of_moves[rows, ..., neurons], sums.of_whole[rows, :, neurons] = own.of_moves, own.of_whole

        # Work on all neurons of a token together if most of its pairs are among them.
        most = pairs.double().mean(dim=1) > 0.5
        rest = enumerate((pairs & ~most[:, None]).T)
        rows_of_neurons = [(slice(None), most), *((slice(number, number + 1), rows) for number, rows in rest)]
        at_once = max(1, readout.at_once // readout.vocab_size)
        blocks = [
            (neurons, part) for neurons, rows in rows_of_neurons for part in rows.nonzero()[:, 0].split(at_once) if len(part)
        ]
        on_all_cores(replace, blocks, outputs.y.device)
