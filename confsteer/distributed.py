"""Several processes that work as one: each reads its share of the text, and their sums are added up.

``accelerate launch`` and ``torchrun`` start the processes. In a single process everything here returns its argument as it is.
"""

from __future__ import annotations

import atexit
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Process(NamedTuple):
    """Rank and world size of this process."""

    rank: int
    world_size: int


SINGLE_PROCESS = Process(0, 1)


def init_distributed() -> Process:
    """Connect to the other processes if a launcher started several (gloo on CPUs, nccl on GPUs). Say which one this is."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState()
        atexit.register(dist.destroy_process_group)
    return this_process()


def this_process() -> Process:
    """Say which of the connected processes this is."""
    return Process(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else SINGLE_PROCESS


def all_reduce(values: Tensor) -> Tensor:
    """Return the sum over all processes, in each of them."""
    if this_process().world_size == 1:
        return values
    total = _on_backend(values)
    dist.all_reduce(total)
    return total.to(values.device)


def broadcast(values: Tensor) -> Tensor:
    """Return the first process's values (of the same shape), in each of them."""
    if this_process().world_size == 1:
        return values
    copy = _on_backend(values)
    dist.broadcast(copy, src=0)
    return copy.to(values.device)


def _on_backend(values: Tensor) -> Tensor:
    """Copy values to where the backend can reach them: nccl only knows GPUs."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return values.detach().to(device, copy=True).contiguous()
