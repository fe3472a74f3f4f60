"""Entropy of the unsteered output at each temperature, to find the temperature with the same entropy as a dial."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.cores import Scratch, exponential, on_all_cores
from confsteer.last_layer.readout import FullOutputs, Readout

OCTAVES, PER_OCTAVE = 2, 5
"""Range and density of temperatures: from 1/4 to 4, five in each factor of two. To halve a temperature costs a square, not an
exponential."""
BISECTIONS = 60


class EntropyMeans(NamedTuple):
    """Means over tokens at each temperature, float64 ``[temperatures]``. Temperatures rise, and 1 is in the middle."""

    log_temperature: Tensor
    entropy: Tensor
    """Mean entropy of ``softmax(logits / T)``, in nats."""
    slope: Tensor
    """``d entropy / d log T``, which is the mean variance of ``logits / T``."""

    def temperature_of(self, change: Tensor) -> Tensor:
        """Find the temperatures at which the mean entropy differs by so many nats, ``[...]``, from that at temperature 1.

        Between two temperatures the entropy is the cubic with their values and slopes (Hermite interpolation). It is right to a
        few 1e-5 nats. The result is NaN where the change is out of range.
        """
        x, y = self.log_temperature, self.entropy
        target = y[len(y) // 2] + change.to(y)
        at = (torch.searchsorted(y, target, right=True) - 1).clamp(0, len(y) - 2)
        width = x[at + 1] - x[at]
        y0, y1, m0, m1 = y[at], y[at + 1], width * self.slope[at], width * self.slope[at + 1]
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(BISECTIONS):
            t = (low + high) / 2
            value = y0 + t * (m0 + t * (3 * (y1 - y0) - 2 * m0 - m1 + t * (2 * (y0 - y1) + m0 + m1)))
            low, high = torch.where(value < target, t, low), torch.where(value < target, high, t)
        found = (x[at] + low * width).exp()
        return torch.where((target >= y[0]) & (target <= y[-1]), found, torch.nan)


class EntropyByTemperature:
    """Accumulator of `EntropyMeans` over a stream of tokens."""

    def __init__(self, readout: Readout) -> None:
        """
        Args:
            readout: the model's last layer.
        """
        self._readout = readout
        steps = torch.arange(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE + 1, dtype=torch.float64)
        self._log_temperature = steps * (math.log(2) / PER_OCTAVE)
        self._sums = torch.zeros(2, len(self._log_temperature), dtype=torch.float64)
        self._count = torch.tensor(0)

    def update(self, outputs: FullOutputs) -> None:
        """Add tokens."""
        betas = (-self._log_temperature).exp().tolist()
        sums = outputs.y.new_empty(3, len(betas), len(outputs.y))
        # Take blocks of tokens that, by the vocabulary, stay in the cache.
        at_once, scratch = max(1, self._readout.at_once // self._readout.vocab_size), Scratch(outputs.y)

        def measure(first: int) -> None:
            rows = slice(first, first + at_once)
            capped = self._readout.cap(outputs.y[rows])
            z, product, e = (scratch.empty(name, *capped.shape) for name in ("z", "product", "e"))
            torch.sub(capped, capped.amax(dim=-1, keepdim=True), out=z)
            for highest in range(len(betas) - PER_OCTAVE, len(betas)):
                exponential(torch.mul(z, betas[highest], out=e), out=e)
                for row in range(highest, -1, -PER_OCTAVE):
                    sums[0, row, rows] = e.sum(dim=-1)
                    sums[1, row, rows] = torch.mul(e, z, out=product).sum(dim=-1)
                    sums[2, row, rows] = product.mul_(z).sum(dim=-1)
                    e.square_()

        on_all_cores(measure, range(0, len(outputs.y), at_once), sums.device)
        total, total_z, total_squared = sums.double().cpu()
        beta = torch.tensor(betas, dtype=torch.float64)[:, None]
        mean = total_z / total
        variance = (total_squared / total - mean.square()).clamp_min(0)
        self._sums += torch.stack([total.log() - beta * mean, beta.square() * variance]).sum(dim=-1)
        self._count += len(outputs.y)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._sums, self._count

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._sums, self._count = all_reduce(self._sums), all_reduce(self._count)

    def result(self) -> EntropyMeans:
        """Means over all tokens so far."""
        return EntropyMeans(self._log_temperature, *(self._sums / int(self._count)))
