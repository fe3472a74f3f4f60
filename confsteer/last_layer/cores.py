"""Work in the way that suits a processor: blocks side by side, and exponentials.

An operation on a block that fits a core's cache takes a tenth of a millisecond. Shared between cores it takes as long, and ten
times longer where another program has one of them: all wait for the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Block = TypeVar("Block")


def on_all_cores(work: Callable[[Block], object], blocks: Iterable[Block], device: torch.device) -> None:
    """Do `work` on each of the blocks, without gradients; on a CPU on as many at once as torch has threads.

    Args:
        work: writes its results to a place of its own.
        blocks: what it is called with. Fewer than there are threads follow each other, each on all cores.
        device: that it computes on; if it is no CPU, the blocks follow each other.
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
        # Threads that are started from now on take the number that was set last, in any thread.
        torch.set_num_threads(n_threads)


def exponential(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``e^x`` as ``2^(x log₂ e)``, which takes a third of the time on some processors.

    The relative error is that of a rounded ``x log₂ e``: ``|x| · 6e-8`` in float32, nothing for a probability.

    Args:
        x: any tensor.
        out: where to write it; may be `x` itself.
    """
    return torch.mul(x, math.log2(math.e), out=out).exp2_()
