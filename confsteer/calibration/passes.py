"""Passes over a recorded text. Each of them adds up tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from confsteer.bars import progress_bar
from confsteer.calibration.progress import Progress
from confsteer.discovery.streaming import Accumulator
from confsteer.distributed import all_reduce, broadcast
from confsteer.last_layer.states import TokenStates
from confsteer.model.states import Recording, in_groups, join_batches


class Passes:
    """A recorded text that every stage of a calibration reads once.

    A pass starts where an interrupted one stopped. At its end the sums of all processes are joined.
    """

    def __init__(self, recording: Recording, progress: Progress, *, show: bool = False) -> None:
        """
        Args:
            recording: the text.
            progress: the sums of an interrupted run, if there was one.
            show: whether to show a progress bar for each pass.
        """
        self._recording, self._progress, self._show = recording, progress, show

    @property
    def texts(self) -> int:
        """Count the texts that are recorded."""
        return len(self._recording.windows.text_starts)

    @property
    def sample_tokens(self) -> int:
        """Count the tokens of the recording's sample, about: a window may have one more or less."""
        return self._recording.sample_tokens

    def over(
        self, name: str, *into: Accumulator, label: str, at_least: int = 0, sample: bool = False, text: int | None = None
    ) -> Iterator[tuple[TokenStates, Callable[[float], None]]]:
        """Read the text once.

        Args:
            name: name of the pass in the progress file.
            into: the accumulators that the caller updates with each batch before it asks for the next.
            label: label of the progress bar.
            at_least: least number of tokens in a batch. Batches end where they would have ended without an interruption.
            sample: whether to read the recording's sample only.
            text: number of the text to read; all texts if None.

        Yields:
            The states of a batch, and a function to call with the share of the work on them that is done. It moves the progress
            bar within the batch.
        """
        batches = self._progress.track(name, [tensor for accumulator in into for tensor in accumulator.sums])
        windows = self._recording.windows
        tokens = windows.n_tokens if text is None else windows.text_tokens[text]
        share = tokens // self._recording.process.world_size
        with progress_bar(label, share, show=self._show) as bar:
            read = 0

            def count(tokens: int) -> None:
                nonlocal read
                read += tokens

            batches_of_text = self._recording.read(count, start=int(batches), sample=sample, text=text)
            for group in in_groups(batches_of_text, at_least):
                first, size = bar.n, read - bar.n

                def move_to(share: float, first: int = first, size: int = size) -> None:
                    bar.update(first + round(min(share, 1) * size) - bar.n)

                yield join_batches(group), move_to
                move_to(1)
                # Count the batch: the caller has added it up by now.
                batches += len(group)
                self._progress.write_if_due()
        for accumulator in into:
            accumulator.pool(all_reduce)

    def decide_once(self, name: str, decide: Callable[[list[TokenStates]], Tensor], *, at_least: int) -> Tensor:
        """Decide something by the first tokens of each text. The result is the same in every process and after an interruption.

        Args:
            name: name of the decision in the progress file.
            decide: function that is given the first batch of the sample of each text that this process reads. It returns a
                tensor whose shape does not depend on them.
            at_least: least number of tokens in each of these batches.
        """

        def compute() -> Tensor:
            groups = (next(in_groups(self._recording.read(sample=True, text=i), at_least), None) for i in range(self.texts))
            return broadcast(decide([join_batches(group) for group in groups if group is not None]))

        return self._progress.once(name, compute)
