"""Fast work on a processor's cores: blocks side by side, memory that is used again, and exponentials.

An operation on a block that fits a core's cache takes a tenth of a millisecond. Sharing it between cores does not make it
faster. If another program uses one of them, it takes ten times longer: all wait for the last.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Block = TypeVar("Block")


def on_all_cores(work: Callable[[Block], object], blocks: Iterable[Block], device: torch.device) -> None:
    """Do `work` on each of the blocks, without gradients. On a CPU, do as many blocks at once as torch has threads.

    Args:
        work: a function that writes its results to a place of its own.
        blocks: arguments of `work`, one a call. Fewer blocks than threads are done one by one, each on all cores.
        device: device that `work` computes on. If it is no CPU, the blocks are done one by one.
    """
    several, n_threads = list(blocks), torch.get_num_threads()

    @torch.no_grad()  # a setting of the thread
    def without_gradients(block: Block) -> None:
        work(block)

    if device.type != "cpu" or n_threads == 1 or len(several) < n_threads:
        for block in several:
            without_gradients(block)
        return
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(without_gradients, several):
                pass
    finally:
        # Restore the number: new threads take the one that was set last, in any thread.
        torch.set_num_threads(n_threads)


class Scratch(threading.local):
    """Memory for temporary tensors, which each thread keeps for its next block.

    A new tensor of a block's size takes as long as several operations on it: the system clears its pages first.
    """

    def __init__(self, like: Tensor) -> None:
        """
        Args:
            like: a tensor of the same type, on the same device.
        """
        self._like, self._memory = like, dict[str, Tensor]()

    def empty(self, name: str, *shape: int) -> Tensor:
        """Give the thread's memory of a name, whatever is in it, ``[*shape]``. The tensor it gave before is overwritten."""
        size, memory = math.prod(shape), self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = self._like.new_empty(size)
        return memory[:size].view(shape)


def exponential(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute ``e^x`` as ``2^(x log₂ e)``, which takes a third of the time on some processors.

    The relative error is that of a rounded ``x log₂ e``: ``|x| · 6e-8`` in float32. For a probability that is negligible.

    Args:
        x: any tensor.
        out: where to write it; may be `x` itself.
    """
    return torch.mul(x, math.log2(math.e), out=out).exp2_()
