"""Fast work on a processor's cores: blocks side by side, and exponentials.

An operation on a block that fits a core's cache takes a tenth of a millisecond. Sharing it between cores does not make it
faster. If another program uses one of them, it takes ten times longer: all wait for the last.
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


def exponential(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute ``e^x`` as ``2^(x log₂ e)``, which takes a third of the time on some processors.

    The relative error is that of a rounded ``x log₂ e``: ``|x| · 6e-8`` in float32. For a probability that is negligible.

    Args:
        x: any tensor.
        out: where to write it; may be `x` itself.
    """
    return torch.mul(x, math.log2(math.e), out=out).exp2_()
