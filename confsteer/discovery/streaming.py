"""Statistics over a stream of tokens. Nothing here grows with the number of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.effects import TokenEffects, TokenSlopes


class ActivationMoments:
    """Mean and standard deviation of each neuron's activation, in float64.

    Half precision overflows on the largest neurons, and float32 sums lose digits over millions of tokens. Chunks are
    merged by the parallel update of Chan, Golub and LeVeque (1979), which does not subtract large squares.
    """

    def __init__(self, n_neurons: int) -> None:
        self.count = 0
        self.mean = torch.zeros(n_neurons, dtype=torch.float64)
        self._squares = torch.zeros(n_neurons, dtype=torch.float64)

    def update(self, activations: Tensor) -> None:
        """Add ``[tokens, n_neurons]`` activations."""
        n = len(activations)
        if n == 0:
            return
        chunk = activations.double().cpu()
        mean = chunk.mean(dim=0)
        shift = mean - self.mean
        total = self.count + n
        self._squares += (chunk - mean).square().sum(dim=0) + shift.square() * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Unbiased, ``[n_neurons]``."""
        return (self._squares / max(1, self.count - 1)).sqrt()


class Estimate(NamedTuple):
    """A mean over tokens (or a ratio of two) with its standard error over windows, float64 ``[n_neurons]``."""

    value: Tensor
    standard_error: Tensor


class NeuronEffects(NamedTuple):
    """Effects of each neuron, averaged over tokens, in nats."""

    total: Estimate
    """``mean |Δloss|`` when the neuron is set to its mean."""
    direct: Estimate
    """The same with the final norm frozen."""
    mediation: Estimate
    """``1 − direct/total``: the share of the effect that goes through the final norm."""
    loss: Estimate
    """``mean Δloss``, signed."""
    entropy: Estimate
    """``mean Δentropy``, signed."""
    entropy_abs: Estimate
    """``mean |Δentropy|``."""
    frequency: Estimate
    """``mean |ΔKL(P_freq ‖ P_model)|``."""
    frequency_mediation: Estimate
    """``1 − direct_freq/total``: the share of the effect that goes through the unigram direction."""
    entropy_slope: Estimate
    """``mean d entropy / d activation``: its sign is the neuron's sign on the entropy dial."""
    unigram_slope: Estimate
    """``mean −d KL(P_model ‖ P_freq) / d activation``: its sign is the neuron's sign on the unigram dial."""


class EffectMeans:
    """Averages `TokenEffects` and `TokenSlopes` over tokens, with standard errors over windows.

    A window's tokens are not independent, so a window is the unit: with window sums ``S_w`` of ``n_w`` tokens the mean is
    ``Σ S_w / Σ n_w``, and its variance that of the linearised ratio, ``W/(W−1) · Σ (S_w − mean·n_w)² / (Σ n_w)²``.
    """

    MEANS = (
        "total",
        "direct",
        "without_frequency",
        "loss",
        "entropy",
        "entropy_abs",
        "frequency",
        "entropy_slope",
        "unigram_slope",
    )

    def __init__(self, n_neurons: int) -> None:
        zeros = torch.zeros(len(self.MEANS), n_neurons, dtype=torch.float64)
        self._sum, self._sum_squared, self._sum_times_n = zeros.clone(), zeros.clone(), zeros.clone()
        self._sum_times_total = zeros.clone()
        self._n = self._n_squared = 0.0
        self.windows = 0

    def update(self, effects: TokenEffects, slopes: TokenSlopes, window: Tensor) -> None:
        """Add tokens; `window` ``[tokens]`` says which window each came from. A window must come whole."""
        _, index = window.unique(return_inverse=True)
        n_windows = int(index.max()) + 1 if len(index) else 0
        n = torch.bincount(index, minlength=n_windows).double().cpu()

        def per_window(values: Tensor) -> Tensor:
            sums = torch.zeros(n_windows, values.shape[1], dtype=torch.float64, device=values.device)
            return sums.index_add_(0, index, values.double()).cpu()

        sums = torch.stack(
            [
                per_window(effects.loss.abs()),
                per_window(effects.direct_loss.abs()),
                per_window(effects.loss_without_frequency.abs()),
                per_window(effects.loss),
                per_window(effects.entropy),
                per_window(effects.entropy.abs()),
                per_window(effects.frequency_kl.abs()),
                per_window(slopes.entropy),
                per_window(-slopes.unigram_kl),
            ]
        )  # [means, windows, neurons]
        self._sum += sums.sum(dim=1)
        self._sum_squared += sums.square().sum(dim=1)
        self._sum_times_n += (sums * n[:, None]).sum(dim=1)
        self._sum_times_total += (sums * sums[0]).sum(dim=1)
        self._n += float(n.sum())
        self._n_squared += float(n.square().sum())
        self.windows += n_windows

    def result(self) -> NeuronEffects:
        """The averages; standard errors are infinite if there is one window only."""
        correction = self.windows / (self.windows - 1) if self.windows > 1 else float("inf")

        def mean(name: str) -> Estimate:
            row = self.MEANS.index(name)
            value = self._sum[row] / self._n
            squares = self._sum_squared[row] - 2 * value * self._sum_times_n[row] + value.square() * self._n_squared
            return Estimate(value, (correction * squares.clamp_min(0)).sqrt() / self._n)

        def share_of_total(name: str) -> Estimate:
            row, total = self.MEANS.index(name), self._sum[0].clamp_min(torch.finfo(torch.float64).tiny)
            ratio = self._sum[row] / total
            squares = self._sum_squared[row] - 2 * ratio * self._sum_times_total[row] + ratio.square() * self._sum_squared[0]
            return Estimate(1 - ratio, (correction * squares.clamp_min(0)).sqrt() / total)

        return NeuronEffects(
            total=mean("total"),
            direct=mean("direct"),
            mediation=share_of_total("direct"),
            loss=mean("loss"),
            entropy=mean("entropy"),
            entropy_abs=mean("entropy_abs"),
            frequency=mean("frequency"),
            frequency_mediation=share_of_total("without_frequency"),
            entropy_slope=mean("entropy_slope"),
            unigram_slope=mean("unigram_slope"),
        )
