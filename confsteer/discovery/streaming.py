"""Statistics over a stream of tokens. Nothing here grows with the number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from confsteer.discovery.exact import ExactAblation, ExactEffects
from confsteer.discovery.token_effects import TokenEffects, TokenSlopes
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.states import join_rows
from confsteer.last_layer.unigram import Unigram


class Accumulator(Protocol):
    """Sums over a stream of tokens, in one process of several. Their size does not depend on the number of tokens."""

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The accumulator's complete state. `update` changes these tensors in place."""

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Join the sums of all processes. `all_reduce` adds up a tensor over them."""


class ActivationMoments:
    """Mean and standard deviation of each neuron's activation, in float64.

    Half precision overflows on the largest neurons. Float32 sums lose digits over millions of tokens. Chunks are merged by the
    parallel update of Chan, Golub and LeVeque (1979), which does not subtract large squares.
    """

    def __init__(self, n_neurons: int) -> None:
        self._count = torch.tensor(0)
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
        self._count += n

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self._count)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._count, self.mean, self._squares

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        n, own_mean = self.count, self.mean
        self._count = all_reduce(self._count)
        self.mean = all_reduce(n * own_mean) / max(1, self.count)
        self._squares = all_reduce(self._squares + n * (own_mean - self.mean).square())

    @property
    def std(self) -> Tensor:
        """Unbiased, ``[n_neurons]``."""
        return (self._squares / max(1, self.count - 1)).sqrt()


class WithError(NamedTuple):
    """A mean over tokens (or a ratio of two) with its standard error over windows, float64 ``[n_neurons]``."""

    value: Tensor
    standard_error: Tensor


class NeuronEffects(NamedTuple):
    """Effects of each neuron, averaged over tokens, in nats."""

    total: WithError
    """``mean |Δloss|`` when the neuron is set to its mean."""
    direct: WithError
    """The same with the final norm frozen."""
    mediation: WithError
    """``1 − direct/total``: the share of the effect that goes through the final norm."""
    loss: WithError
    """``mean Δloss``, signed."""
    entropy: WithError
    """``mean Δentropy``, signed."""
    entropy_abs: WithError
    """``mean |Δentropy|``."""
    entropy_norm: WithError
    """Part of ``mean Δentropy`` that goes through the final norm, signed. The three parts add up to `entropy`."""
    entropy_write_norm: WithError
    """Part that goes through the norm on the MLP's output; zero in a model without one."""
    entropy_straight: WithError
    """Part that goes straight to the logits."""
    norm_share: WithError
    """``mean |part through the final norm|`` over the sum of that and ``mean |part straight to the logits|``.

    The two may oppose each other. Then the total and the direct effect do not say how large either part is, but this share does.
    The effect of a norm on the MLP's output, which scales down the other writes, belongs to neither part.
    """
    frequency: WithError
    """``mean |ΔKL(P_freq ‖ P_model)|``."""
    frequency_mediation: WithError
    """``1 − direct_freq/total``: the share of the effect that goes through the unigram direction."""
    entropy_slope: WithError
    """``mean d entropy / d activation``: its sign is the neuron's sign on the entropy dial."""
    unigram_slope: WithError
    """``mean −d KL(P_model ‖ P_freq) / d activation``: its sign is the neuron's sign on the unigram dial."""

    def with_rows(self, neurons: list[int], rows: NeuronEffects) -> NeuronEffects:
        """Copy the effects, with those of some neurons replaced by `rows`, in the order of `neurons`."""

        def replace(column: Tensor, by: Tensor) -> Tensor:
            return column.index_put((torch.tensor(neurons, dtype=torch.long),), by)

        return NeuronEffects(*(WithError(*map(replace, own, new)) for own, new in zip(self, rows, strict=True)))


class EffectMeans:
    """Averages of `TokenEffects` and `TokenSlopes` over tokens, with standard errors over windows.

    A window's tokens are not independent, so the window is the unit. With window sums ``S_w`` of ``n_w`` tokens the mean is
    ``Σ S_w / Σ n_w``. Its variance is that of the linearised ratio, ``W/(W−1) · Σ (S_w − mean·n_w)² / (Σ n_w)²``.
    """

    MEANS = (
        "total",
        "direct",
        "without_frequency",
        "loss",
        "entropy",
        "entropy_abs",
        "entropy_norm",
        "entropy_write_norm",
        "entropy_straight",
        "entropy_norm_abs",
        "entropy_norm_and_straight_abs",
        "frequency",
        "entropy_slope",
        "unigram_slope",
    )

    WHOLES = ("total", "entropy_norm_and_straight_abs")

    def __init__(self, n_neurons: int) -> None:
        shape = (len(self.MEANS), n_neurons)
        # Σ S_w, Σ S_w², Σ S_w n_w and Σ S_w · (that of each whole); Σ n_w, Σ n_w² and the number of windows.
        self._sums = torch.zeros(3 + len(self.WHOLES), *shape, dtype=torch.float64)
        self._counts = torch.zeros(3, dtype=torch.float64)

    def update(
        self, effects: TokenEffects, window: Tensor, slopes: TokenSlopes | None = None, *, among: Tensor | None = None
    ) -> None:
        """Add tokens. All tokens of a window must come in one call.

        Args:
            effects: effects on the tokens.
            window: window of each token, ``[tokens]``.
            slopes: slopes on the tokens. If they are never given, they are zero in the result.
            among: window of every token that the average is over, if there are more tokens, on which there is no effect.
        """
        present, n = (window if among is None else among).unique(return_counts=True)
        index = torch.searchsorted(present, window)
        in_window = (torch.arange(len(n), device=window.device)[:, None] == index).to(effects.loss.dtype)
        norm, write_norm = effects.entropy - effects.direct_entropy, effects.direct_entropy - effects.straight_entropy
        straight = effects.straight_entropy
        columns = (
            effects.loss.abs(),
            effects.direct_loss.abs(),
            effects.loss_without_frequency.abs(),
            effects.loss,
            effects.entropy,
            effects.entropy.abs(),
            norm,
            write_norm,
            straight,
            norm.abs(),
            norm.abs() + straight.abs(),
            effects.frequency_kl.abs(),
            slopes.entropy if slopes else torch.zeros_like(effects.loss),
            -slopes.unigram_kl if slopes else torch.zeros_like(effects.loss),
        )
        sums = torch.stack([in_window @ column for column in columns]).double().cpu()  # [means, windows, neurons]
        sizes = n.double().cpu()
        wholes = (sums[self.MEANS.index(name)] for name in self.WHOLES)
        products = (torch.ones_like(sums), sums, sizes[:, None], *wholes)
        self._sums += torch.stack([(sums * factor).sum(dim=1) for factor in products])
        self._counts += torch.stack([sizes.sum(), sizes.square().sum(), torch.tensor(len(n), dtype=torch.float64)])

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._sums, self._counts

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._sums, self._counts = all_reduce(self._sums), all_reduce(self._counts)

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self._counts[0])

    def result(self) -> NeuronEffects:
        """Compute the averages. Standard errors are infinite if there is only one window."""
        total_sum, squared, times_n, *times_whole = self._sums
        n, n_squared, windows = self._counts.tolist()
        correction = windows / (windows - 1) if windows > 1 else float("inf")

        def mean(name: str) -> WithError:
            row = self.MEANS.index(name)
            value = total_sum[row] / n
            squares = squared[row] - 2 * value * times_n[row] + value.square() * n_squared
            return WithError(value, (correction * squares.clamp_min(0)).sqrt() / n)

        def share(name: str, whole: str) -> WithError:
            row, of = self.MEANS.index(name), self.MEANS.index(whole)
            total, times_total = total_sum[of].clamp_min(torch.finfo(torch.float64).tiny), times_whole[self.WHOLES.index(whole)]
            ratio = total_sum[row] / total
            squares = squared[row] - 2 * ratio * times_total[row] + ratio.square() * squared[of]
            return WithError(ratio, (correction * squares.clamp_min(0)).sqrt() / total)

        def rest_of_total(name: str) -> WithError:
            ratio, error = share(name, "total")
            return WithError(1 - ratio, error)

        return NeuronEffects(
            total=mean("total"),
            direct=mean("direct"),
            mediation=rest_of_total("direct"),
            loss=mean("loss"),
            entropy=mean("entropy"),
            entropy_abs=mean("entropy_abs"),
            entropy_norm=mean("entropy_norm"),
            entropy_write_norm=mean("entropy_write_norm"),
            entropy_straight=mean("entropy_straight"),
            norm_share=share("entropy_norm_abs", "entropy_norm_and_straight_abs"),
            frequency=mean("frequency"),
            frequency_mediation=rest_of_total("without_frequency"),
            entropy_slope=mean("entropy_slope"),
            unigram_slope=mean("unigram_slope"),
        )


class ReportedEffects(NamedTuple):
    """Exact effects of a few neurons, averaged over tokens."""

    effects: NeuronEffects
    uncapped: NeuronEffects | None
    """The same of the logits before the softcap, in a model that has one."""
    argmax_changed: Tensor
    """Share of tokens whose most likely next token changes, float64 ``[neurons]``."""
    entropy: float
    """Mean output entropy of the unsteered model, in nats."""
    loss: float
    """Mean next-token loss of the unsteered model, in nats."""


class ExactEffectMeans:
    """Averages of the exact effects of ablating a few neurons."""

    def __init__(self, readout: Readout, neurons: Tensor, mean: Tensor, unigram: Unigram) -> None:
        """
        Args:
            readout: the model's last layer, of all neurons.
            neurons: indices of the few, ``[neurons]``.
            mean: activations that ablation sets neurons to, for all neurons, ``[n_neurons]``.
            unigram: the corpus's unigram distribution.
        """
        self._neurons, self._mean, own = neurons, mean[neurons], readout.select(neurons)
        self._ablation = ExactAblation(own, unigram)
        self._uncapped = None
        if own.softcap is not None:
            self._uncapped = ExactAblation(dataclasses.replace(own, softcap=None), unigram)
        self._means, self._uncapped_means = EffectMeans(len(neurons)), EffectMeans(len(neurons))
        self._changed = torch.zeros(len(neurons), dtype=torch.float64)
        self._unsteered = torch.zeros(2, dtype=torch.float64)
        self._waiting: list[ExactEffects] = []
        self._waiting_uncapped: list[TokenEffects] = []

    def evaluate(self, outputs: FullOutputs, activations: Tensor) -> None:
        """Evaluate the next tokens of a batch, with activations ``[tokens, n_neurons]`` of all neurons."""
        delta = self._mean.float() - activations[:, self._neurons].float()
        exact = self._ablation.effects(outputs, delta)
        self._waiting.append(exact)
        self._unsteered += torch.stack([exact.entropy, exact.loss]).double().sum(dim=1).cpu()
        if self._uncapped is not None:
            self._waiting_uncapped.append(self._uncapped.effects(outputs, delta).effects)

    def update(self, window: Tensor, *, among: Tensor | None = None) -> None:
        """Add the tokens evaluated since the last call. `window` and `among` are as in `EffectMeans.update`."""
        if not self._waiting:
            self._waiting = [ExactEffects.of_no_tokens(len(self._neurons), window.device)]
            self._waiting_uncapped = [] if self._uncapped is None else [self._waiting[0].effects]
        effects, slopes, changed, *_ = zip(*self._waiting, strict=True)
        self._means.update(join_rows(effects), window, join_rows(slopes), among=among)
        if self._waiting_uncapped:
            self._uncapped_means.update(join_rows(self._waiting_uncapped), window, among=among)
        self._changed += torch.cat(changed).double().sum(dim=0).cpu()
        self._waiting.clear()
        self._waiting_uncapped.clear()

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._changed, self._unsteered, *self._means.sums, *self._uncapped_means.sums

    def pool(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._means.pool(all_reduce)
        self._uncapped_means.pool(all_reduce)
        self._changed, self._unsteered = all_reduce(self._changed), all_reduce(self._unsteered)

    def result(self) -> ReportedEffects:
        """The averages over all tokens so far."""
        return ReportedEffects(
            effects=self._means.result(),
            uncapped=None if self._uncapped is None else self._uncapped_means.result(),
            argmax_changed=self._changed / self._means.count,
            entropy=float(self._unsteered[0]) / self._means.count,
            loss=float(self._unsteered[1]) / self._means.count,
        )
