"""Predictions of a text under any intervention at the last layer, in closed form.

The model runs over the text once. Two things are kept: the input of the final norm, and the activations of the neurons that
steering can reach. They decide every prediction under any steering of these neurons, any temperature and any constant added
to the residual (`confsteer.last_layer.coordinates`). So steerings are compared, and chosen by gradient, without running the
model again. They are compared exactly, and chosen on a sample of the vocabulary (`confsteer.last_layer.sample`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from confsteer.last_layer.coordinates import Coordinates, Geometry, Plan, Writes
from confsteer.last_layer.cores import on_all_cores
from confsteer.last_layer.edit import change_of
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.readout import WORKING_SET, Readout, products
from confsteer.last_layer.sample import SampledLogits, VocabularySample
from confsteer.last_layer.scores import Predictions, TokenScores
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram

MIN_ROWS = 128
"""Fewest tokens at a time, whatever the vocabulary. Fewer would read the unembedding too often."""

NEAR_SET = 2**19
"""Logits that a core works on at a time (2 MiB). They fit its share of the cache, and are enough to be worth a call."""
SAMPLED_SET, LAUNCHED_SAMPLED_SET = 2**19, 2**22
"""Sampled logits that are worked on at a time, on a CPU and on a GPU."""

OnTokens = Callable[[int], object]
"""A function that is called with the number of tokens that are done."""


def unnoticed(tokens: int) -> None:
    """Take no notice of progress."""


class TextStates:
    """A text as the last layer saw it."""

    def __init__(self, readout: Readout, states: TokenStates, null_direction: Tensor, writes: Writes | None = None) -> None:
        """
        Args:
            readout: the last layer, of the neurons that steering can reach.
            states: states of the text, with the activations of these neurons.
            null_direction: unit vector that the unembedding reads least, ``[d_model]``.
            writes: writes of the neurons and of a constant along the null direction, if they are known already.
        """
        self.readout, self.states, self.null_direction = readout, states, null_direction
        self.writes = Writes(readout, null_direction) if writes is None else writes
        self._sample: VocabularySample | None = None

    @property
    def tokens(self) -> int:
        return len(self.states.targets)

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Dot products that the coordinates of every intervention are made from."""
        return Geometry.of(self.readout, self.writes, self.states)

    @property
    def sample(self) -> VocabularySample:
        """The vocabulary sampled for each token. It takes a pass over the vocabulary, unless `predict` has drawn it already."""
        if self._sample is None:
            self.draw_sample()
        assert self._sample is not None
        return self._sample

    def draw_sample(self, on_tokens: OnTokens = unnoticed) -> None:
        """Draw the `sample` now, in a pass over the vocabulary; see `predict`."""
        self.predict([], sample=True, on_tokens=on_tokens)

    def at(self, rows: Tensor) -> TextStates:
        """Some of the tokens, by index or by mask."""
        some = TextStates(self.readout, self.states.at(rows), self.null_direction, self.writes)
        if self._sample is not None:
            some._sample = self._sample.at(rows)
        if "geometry" in self.__dict__:
            some.geometry = self.geometry.at(rows)
        return some

    def of_neurons(self, neurons: Tensor, writes: Writes) -> TextStates:
        """The same text, with only some of the neurons to change. A sample that was drawn is shared.

        Args:
            neurons: places of these neurons among all that can be changed, ``[n]``.
            writes: writes of these neurons, made from their readout.
        """
        states = self.states._replace(activations=self.states.activations[:, neurons.to(self.states.activations.device)])
        some = TextStates(writes.readout, states, self.null_direction, writes)
        some._sample = self._sample
        return some

    def coordinates(self, intervention: Intervention) -> Coordinates:
        """Coefficients of an intervention at each token."""
        return self.geometry.coordinates(self.readout, self.writes, self.states, intervention)

    @torch.no_grad()
    def predict(
        self,
        wanted: Sequence[Coordinates],
        unigram: Unigram | None = None,
        *,
        sample: bool = False,
        on_tokens: OnTokens = unnoticed,
    ) -> list[Predictions]:
        """Score every prediction under several interventions in one pass: the unembedding is multiplied once per token.

        Args:
            wanted: coordinates of each intervention at all tokens.
            unigram: the distribution that divergences are from; none are computed without one.
            sample: whether to draw the `sample` in the same pass.
            on_tokens: called with the number of tokens after each block.
        """
        if not (wanted or sample):
            return []
        device = self.null_direction.device
        plans = [Plan(self.readout, self.writes, coordinates) for coordinates in wanted]
        found = [Predictions(self.tokens, device, unigram) for _ in wanted]
        drawn = VocabularySample.empty(self.tokens, self.readout) if sample else None
        neutral = Plan(self.readout, self.writes, self.coordinates(Intervention.neutral(self.readout.n_neurons)))
        start = torch.rand(self.tokens, generator=torch.Generator().manual_seed(0)).to(device)

        def score(block: tuple[slice, Tensor]) -> None:
            rows, x = block
            targets = self.states.targets[rows]
            for plan, predictions in zip(plans, found, strict=True):
                predictions.fill(rows, plan.logits(rows, x), targets)
            if drawn is not None:
                drawn.draw(rows, x, neutral.logits(rows, x), targets, start[rows])

        for blocks in self._own_logits():
            on_all_cores(score, blocks, device)
            on_tokens(sum(x.shape[1] for _, x in blocks))
        if drawn is not None:
            self._sample = drawn
        return found

    def _own_logits(self) -> Iterator[list[tuple[slice, Tensor]]]:
        """Blocks of tokens with the logits along their own directions, ``[K, rows, vocab]``, valid until the next blocks."""
        readout, unembedding = self.readout, self.readout.unembedding
        at_once = max(MIN_ROWS, WORKING_SET // readout.vocab_size)
        # Hand on blocks that are small enough for a core's cache.
        few = at_once if unembedding.device.type != "cpu" else max(1, NEAR_SET // readout.vocab_size)
        own = 1 if readout.write_norm is None else 2
        x = torch.empty(own, min(at_once, self.tokens), readout.vocab_size, device=unembedding.device)
        for begin in range(0, self.tokens, at_once):
            part = self.states.at(slice(begin, begin + at_once))
            directions = readout.state(part.residual, part.mlp_output).directions
            number = directions.shape[1]
            here = products(directions, unembedding, out=x if number == x.shape[1] else None)
            ends = [*range(few, number, few), number]
            yield [(slice(begin + row, begin + end), here[:, row:end]) for row, end in zip([0, *ends], ends, strict=False)]

    def scores(self, intervention: Intervention) -> TokenScores:
        """Score the prediction of each token."""
        return self.predict([self.coordinates(intervention)])[0].scores

    def sampled_blocks(self) -> list[slice]:
        """Tokens whose logits on the sample are best worked on at once."""
        sample = self.sample
        at_once = SAMPLED_SET if sample.ids.device.type == "cpu" else LAUNCHED_SAMPLED_SET
        few = max(1, at_once // sample.ids.shape[1])
        return [slice(start, start + few) for start in range(0, self.tokens, few)]

    def sampled_at(self, rows: slice, coordinates: Coordinates) -> SampledLogits:
        """Logits on the sample after an intervention, by whose coordinates at these tokens they can be differentiated."""
        return self.sample.at(rows).logits(self.readout, self.writes, coordinates)

    def sampled(self, coordinates: Coordinates) -> Iterator[SampledLogits]:
        """Logits on the sample after an intervention, a few tokens at a time.

        Args:
            coordinates: of the intervention at all tokens.
        """
        for rows in self.sampled_blocks():
            yield self.sampled_at(rows, coordinates.at(rows))

    @torch.no_grad()
    def sampled_scores(self, intervention: Intervention) -> TokenScores:
        """Score the prediction of each token on the sample, near enough for a search."""
        coordinates, blocks = self.coordinates(intervention), self.sampled_blocks()
        parts: dict[int, TokenScores] = {}

        def score(number: int) -> None:
            rows = blocks[number]
            parts[number] = self.sampled_at(rows, coordinates.at(rows)).scores

        on_all_cores(score, range(len(blocks)), coordinates.cooling.device)
        return TokenScores(*(field.cpu() for field in TokenScores.join([parts[number] for number in range(len(blocks))])))

    def logits(self, intervention: Intervention) -> Tensor:
        """Logits ``[tokens, vocab]`` after an intervention, for a short text: the definition behind the other methods."""
        *edit, null_write, temperature = (column.to(self.null_direction.device) for column in intervention)
        state = self.readout.state(self.states.residual, self.states.mlp_output)
        residual = self.readout.residual_after(state, change_of(self.states, edit))
        return self.readout.logits(residual + null_write * self.null_direction) / temperature
