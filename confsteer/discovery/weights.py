"""Statistics of the last MLP's neurons that follow from the weights alone: no text is needed.

Source of the statistics: Stolfo et al. 2024 (arXiv 2406.16254), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.errors import SettingError
from confsteer.last_layer.readout import ROWS_PER_CHUNK, Readout


class UnembeddingSpectrum(NamedTuple):
    """Singular values and right-singular directions of the folded unembedding, smallest first."""

    singular_values: Tensor
    """Ascending, float64, ``[d]``. ``d`` is ``d_model``, or one less for a LayerNorm: the norm removes the all-ones direction
    before the unembedding."""
    directions: Tensor
    """Orthonormal columns in the order of the singular values, float64, ``[d_model, d]``."""


class WeightStatistics(NamedTuple):
    """Per-neuron statistics ``[n_neurons]`` (float64, on the CPU) and what they were measured against."""

    norm: Tensor
    """``‖w_i‖``."""
    logit_variance: Tensor
    """``Var_t[cos(w_i, W_U[t])]`` over the vocabulary, unbiased."""
    null_fraction: Tensor
    """``‖V₀ᵀw_i‖ / ‖w_i‖``: the share of the write that falls into the effective null space (the paper's ρ)."""
    singular_values: Tensor
    """The spectrum of the folded unembedding, ascending, ``[d]``."""
    null_dims: int
    """``k``, the number of directions counted as effective null space."""
    chance_null_fraction: float
    """Null fraction that the largest of ``n_neurons`` random directions exceeds with a probability of 5 %."""

    @property
    def cliff(self) -> float | None:
        """Smallest singular value outside the null space over the largest inside it. None for an exact null space."""
        within, beyond = (float(value) for value in self.singular_values[self.null_dims - 1 : self.null_dims + 1])
        return beyond / within if within > 0 else None


def _direction_covariance(unembedding: Tensor) -> Tensor:
    """Unbiased covariance over the vocabulary of the rows' directions, float64 ``[d_model, d_model]``."""
    n, d = unembedding.shape
    gram = torch.zeros(d, d, dtype=torch.float64, device=unembedding.device)
    total = torch.zeros(d, dtype=torch.float64, device=unembedding.device)
    for rows in unembedding.split(ROWS_PER_CHUNK):
        rows = rows.double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        gram.addmm_(rows.T, rows)
        total += rows.sum(dim=0)
    return (gram - torch.outer(total, total) / n) / (n - 1)


def unembedding_spectrum(readout: Readout) -> UnembeddingSpectrum:
    """Spectrum of the folded unembedding, from its Gram matrix in float64 (the Gram squares small singular values)."""
    gram = readout.gram
    if readout.centred:
        # Lift the all-ones direction above the rest of the spectrum, then drop the top.
        ones = torch.full((readout.d_model,), readout.d_model**-0.5, dtype=gram.dtype, device=gram.device)
        gram = gram + 2 * gram.trace() * torch.outer(ones, ones)
    eigenvalues, directions = torch.linalg.eigh(gram)
    if readout.centred:
        eigenvalues, directions = eigenvalues[:-1], directions[:, :-1]
    return UnembeddingSpectrum(eigenvalues.clamp_min(0).sqrt().cpu(), directions)


def choose_null_dims(singular_values: Tensor) -> int:
    """Find where the spectrum falls off its cliff: the ``k`` that the paper reads off a plot by eye.

    Two straight lines are fitted to the smallest quarter of the log spectrum, with a break between them. The best break predicts
    each value best when that value is left out of the fit. ``k`` is the number of singular values before it. A spectrum without
    a cliff gives some ``k`` too, but then no neuron stands out from chance.

    Args:
        singular_values: ascending, ``[d]``.
    """
    floor = singular_values[-1] * 1e-6
    values = singular_values[: max(4, len(singular_values) // 4)].double().clamp_min(floor).log()
    breaks = range(1, len(values) - 1)
    return min(breaks, key=lambda k: _left_out_error(values[:k]) + _left_out_error(values[k:]))


def _left_out_error(y: Tensor) -> float:
    """Squared error of predicting each value from a line through the others. With two values, each predicts the other."""
    if len(y) == 1:
        return 0.0
    if len(y) == 2:
        return 2 * float((y[1] - y[0]).square())
    x = torch.arange(len(y), dtype=y.dtype, device=y.device) - (len(y) - 1) / 2
    spread = x.square().sum()
    residual = y - y.mean() - x * ((x * y).sum() / spread)
    leverage = 1 / len(y) + x.square() / spread
    return float((residual / (1 - leverage)).square().sum())


def chance_null_fraction(d: int, null_dims: int, n_neurons: int, *, seed: int = 0) -> float:
    """Estimate the null fraction that the largest of `n_neurons` random directions in `d` dimensions exceeds 1 time in 20.

    A random direction's squared null fraction is ``Beta(k/2, (d-k)/2)``, drawn here as a ratio of gamma variables.
    """
    generator = torch.Generator().manual_seed(seed)
    repeats = 200

    def chi_square(dof: int) -> Tensor:
        shape = torch.full((repeats, n_neurons), dof / 2, dtype=torch.float64)
        return torch._standard_gamma(shape, generator=generator)

    # Work in place: there may be very many neurons.
    null = chi_square(null_dims)
    squared = null.div_(chi_square(d - null_dims).add_(null))
    return float(squared.max(dim=1).values.sqrt().quantile(0.95))


def with_null_dims(readout: Readout, weights: WeightStatistics, sizes: Sequence[int], *, seed: int = 0) -> list[WeightStatistics]:
    """Compute the statistics again, with other numbers of directions counted as the null space.

    Args:
        readout: the model's last layer.
        weights: its statistics.
        sizes: numbers of directions, each between 1 and the rank of the spectrum less one.
        seed: of the random directions behind the chance level.
    """
    directions = unembedding_spectrum(readout).directions
    found = []
    for k in sizes:
        inside = torch.cat(
            [(rows.double() @ directions[:, :k]).norm(dim=1).cpu() for rows in readout.w_out.split(ROWS_PER_CHUNK)]
        )
        found.append(
            weights._replace(
                null_fraction=(inside / weights.norm.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1),
                null_dims=k,
                chance_null_fraction=chance_null_fraction(len(weights.singular_values), k, readout.n_neurons, seed=seed),
            )
        )
    return found


def weight_statistics(
    readout: Readout, writes: Iterable[Tensor] | None = None, *, null_dims: int | None = None, seed: int = 0
) -> WeightStatistics:
    """Compute norm, logit variance and null fraction of every neuron, and the chance level of the null fraction.

    Args:
        readout: the model's last layer.
        writes: folded writes of its neurons, ``[n, d_model]`` at a time; those of `readout` if None.
        null_dims: ``k``; if None, `choose_null_dims` finds it from the spectrum.
        seed: of the random directions behind the chance level.

    Raises:
        SettingError: `null_dims` is not between 1 and the rank of the spectrum less one.
    """
    spectrum = unembedding_spectrum(readout)
    d = len(spectrum.singular_values)
    k = choose_null_dims(spectrum.singular_values) if null_dims is None else null_dims
    if not 0 < k < d:
        raise SettingError(f"null_dims is {k}; it must be between 1 and {d - 1}")
    covariance, null_space = _direction_covariance(readout.unembedding), spectrum.directions[:, :k]
    parts = []
    for rows in readout.w_out.split(ROWS_PER_CHUNK) if writes is None else writes:
        rows = rows.double()
        length = rows.norm(dim=1)
        unit = rows / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        # Var_t of (row_t · unit) is a quadratic form in the covariance of the rows: no [vocab, n_neurons] product.
        logit_variance = ((unit @ covariance) * unit).sum(dim=1).clamp_min(0)
        null_fraction = (unit @ null_space).norm(dim=1).clamp_max(1)  # rounding
        parts.append((length.cpu(), logit_variance.cpu(), null_fraction.cpu()))
    norm, logit_variance, null_fraction = map(torch.cat, zip(*parts, strict=True))
    return WeightStatistics(
        norm=norm,
        logit_variance=logit_variance,
        null_fraction=null_fraction,
        singular_values=spectrum.singular_values,
        null_dims=k,
        chance_null_fraction=chance_null_fraction(d, k, len(norm), seed=seed),
    )
