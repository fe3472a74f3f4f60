"""Exact effects of a few neurons by a power series, where its remainder is negligible.

Most models move the logits of a token by ``Δ = α x + β u``. Here ``x`` are the token's own logits without their bias. The neuron
writes ``u`` to them. ``α`` and ``β`` are numbers (`confsteer.last_layer.readout`). With ``x`` and ``u`` centred under ``p``

    Σ p e^Δ = Σ_ij β^i α^j / (i! j!) · Σ p u^i x^j

The moments ``Σ p u^i x^j`` do not depend on the move. They are products of two matrices: the weights ``p x^j`` of all tokens, and
the powers ``u^i`` of all neurons. That takes a fifth of the time of an exponential for each token, neuron and vocabulary entry.

**Remainder.** The series ends at the order ``M``, which is even. By Taylor's theorem the rest is ``Δ^M/M! (e^ξ − 1)`` with ``ξ``
between 0 and ``Δ``. ``E_p[Δ^M]/M!`` is the series' last term. So with ``|Δ| ≤ B`` the sums behind the change of the entropy are
off by at most

    (M + 1 + max |l|) · E_p[Δ^M]/M! · (e^B − 1)        l = log p, centred

Where that exceeds `TOLERANCE`, `confsteer.discovery.exact` takes the exponentials.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.token_effects import Sums, TokenSlopes
from confsteer.last_layer.cores import Scratch, exponential, on_all_cores
from confsteer.last_layer.readout import FullOutputs, Move, Readout
from confsteer.last_layer.unigram import Unigram

ORDER = 6
"""``M``: the order of the last term."""
TOLERANCE = 1e-4
"""Largest bound of the remainder of the sums, in nats. It is pessimistic: effects on loss and entropy are off by 4e-7 nats at
most in SmolLM2 and Qwen2.5-Coder, those of float32 exponentials by 1e-5 and 4e-5 (`eval/series_error.py`)."""
PARTS_PER_THREAD = 4
"""Parts of the vocabulary with sums of their own, for each thread. More share the work more evenly, and take more memory."""
STRETCHES, STRETCH = 8, 64
"""Number and length of the stretches of the vocabulary in which the most likely token is looked for."""


def applies_to(readout: Readout) -> bool:
    """Whether a write moves the logits along a single direction of the token's own, and through no softcap."""
    return readout.softcap is None and readout.write_norm is None


class Series:
    """Sums over the vocabulary of a few neurons, by their power series."""

    def __init__(self, readout: Readout, u: Tensor, unigram: Unigram) -> None:
        """
        Args:
            readout: the model's last layer, of these neurons only.
            u: their writes to the logits, ``[n_neurons, vocab]``.
            unigram: the corpus's unigram distribution.
        """
        self._readout, self._u, self._unigram = readout, u, unigram
        self._range = u.amin(dim=1), u.amax(dim=1)
        # Take powers of numbers of at most 1: they neither overflow nor vanish.
        self._scale = u.abs().amax(dim=1).clamp_min(torch.finfo(u.dtype).tiny)
        fixed = torch.stack([unigram.frequency, unigram.direction])
        self._fixed_u, self._fixed_directions = fixed @ u.T, fixed @ readout.unembedding

    def sum(self, outputs: FullOutputs, moves: Move, sums: Sums, slopes: TokenSlopes) -> Tensor:
        """Sum up the neurons at some tokens.

        Args:
            outputs: the unsteered output at the tokens.
            moves: the neurons' moves there, ``[2, tokens, n_neurons]``.
            sums: where to write the results.
            slopes: where to write the slopes.

        Returns:
            Whether the results of each pair are good, bool ``[tokens, n_neurons]``.
        """
        output, whole = self._normalise(outputs, sums.of_output), moves.at(0)
        x_under_frequency, x_along_v = (outputs.state.directions[0] @ self._fixed_directions.T).split(1, dim=1)
        u_under_frequency, u_along_v = self._fixed_u
        moments = self._measure(outputs, output, x_along_v)
        scaled = Move((moves.along[0].double(),), moves.write.double() * self._scale)
        terms, with_l = (_terms(of, scaled) for of in (moments.of_p, moments.of_l))
        mean_u = (moments.mean_u * self._scale).float()
        x_at_target = outputs.x[0].gather(1, outputs.targets[:, None]) - output.mean_x
        at_target = moves.linear(x_at_target[None], self._u[:, outputs.targets].T - mean_u)
        of_change = torch.stack([order * terms[order] for order in range(2, ORDER + 1)]).sum(dim=0)
        for column, values in enumerate((terms[1:].sum(dim=0), with_l[1:].sum(dim=0), of_change, at_target)):
            sums.of_moves[:, :, column] = values.movedim(0, 1)
        sums.of_whole[:, 0] = whole.linear((x_under_frequency - output.mean_x)[None], u_under_frequency - mean_u)
        sums.of_whole[:, 1] = whole.linear(x_along_v[None], u_along_v)
        held = _terms(moments.held, scaled.at(0))
        sums.of_whole[:, 2] = held[1:].sum(dim=0)
        certain = self._find_largest(outputs, whole, sums.of_whole[:, 3:])
        for slope, values in zip(slopes, self._slopes(outputs, moments), strict=True):
            slope.copy_(values)
        lowest, highest = self._range
        farthest = moves.along[0].abs() * output.farthest_x + moves.write.abs() * torch.maximum(highest - mean_u, mean_u - lowest)
        # The last terms cannot be negative: where they are, they are what rounding left.
        error = (ORDER + 1 + output.farthest_l) * terms[ORDER].abs() * farthest.expm1()
        farthest_held = farthest[0] + sums.of_whole[:, 1].abs() * self._unigram.direction.abs().amax()
        return certain & (error < TOLERANCE).all(dim=0) & (held[ORDER].abs() * farthest_held.expm1() < TOLERANCE)

    def _normalise(self, outputs: FullOutputs, of_output: Tensor) -> _Output:
        """Normalise the outputs, and write their entropy and loss to `of_output` ``[tokens, 2]``."""
        readout, scratch = self._readout, Scratch(outputs.y)
        output = _Output(*outputs.y.new_empty(len(_Output._fields), len(outputs.y), 1))
        entropy, loss = of_output.split(1, dim=1)

        def normalise(rows: slice) -> None:
            x, y, here = outputs.x[0, rows], outputs.y[rows], _Output(*(field[rows] for field in output))
            below, e = scratch.empty("below", *y.shape), scratch.empty("e", *y.shape)
            largest = y.amax(dim=-1, keepdim=True)
            exponential(torch.sub(y, largest, out=below), out=e)
            total = e.sum(dim=-1, keepdim=True)
            mean_below, log_total = below.mul_(e).sum(dim=-1, keepdim=True) / total, total.log()
            torch.add(log_total, largest, out=here.log_z)
            torch.add(mean_below, largest, out=here.mean_y)
            torch.sub(log_total, mean_below, out=entropy[rows])
            torch.sub(here.log_z, y.gather(1, outputs.targets[rows, None]), out=loss[rows])
            torch.maximum(largest - here.mean_y, here.mean_y - y.amin(dim=-1, keepdim=True), out=here.farthest_l)
            if not readout.biased:
                here.mean_x.copy_(here.mean_y)
                here.farthest_x.copy_(here.farthest_l)
                return
            torch.div(e.mul_(x).sum(dim=-1, keepdim=True), total, out=here.mean_x)
            lowest, highest = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
            torch.maximum(highest - here.mean_x, here.mean_x - lowest, out=here.farthest_x)

        on_all_cores(normalise, readout.blocks(len(outputs.y), readout.vocab_size), outputs.y.device)
        return output

    def _measure(self, outputs: FullOutputs, output: _Output, x_along_v: Tensor) -> _Moments:
        """Measure the moments, a stretch of the vocabulary at a time."""
        readout, v, new, scratch = self._readout, self._unigram.direction, outputs.y.new_zeros, Scratch(outputs.y)
        (n, vocab), tokens, biased = self._u.shape, len(outputs.y), readout.biased
        stretches = list(readout.blocks(vocab, max(tokens, 1 + n * ORDER)))
        _, u_along_v = self._fixed_u
        # Each part of the stretches has sums of its own.
        parts = min(len(stretches), PARTS_PER_THREAD * torch.get_num_threads())

        def room(powers_of_x: int) -> Tensor:
            return new(parts, powers_of_x, 1 + n * ORDER, tokens)

        # Without a bias l is x: one more power of x gives the moments with l.
        of_p, of_l, held = room(ORDER + (1 if biased else 2)), room(ORDER + 1 if biased else 0), room(ORDER + 1)
        of_v = new(parts, 2 + n, tokens)

        def measure(part: int) -> None:
            for here in stretches[part::parts]:
                add(here, of_p[part], of_l[part], held[part], of_v[part])

        def add(here: slice, of_p: Tensor, of_l: Tensor, held: Tensor, of_v: Tensor) -> None:
            size = here.stop - here.start
            x, p, weight = (scratch.empty(name, tokens, size) for name in ("x", "p", "weight"))
            torch.sub(outputs.x[0, :, here], output.mean_x, out=x)
            exponential(torch.sub(outputs.y[:, here], output.log_z, out=p), out=p)
            u, v_here = self._u[:, here] / self._scale[:, None], v[None, here]
            powers = scratch.empty("powers", 1 + n * ORDER, size)
            of_v[:-1].addmm_(torch.cat([v_here, v_here * u]), p.T)
            of_v[-1].addmv_(torch.mul(p, x, out=weight), v_here[0])
            if biased:
                _add_up(torch.sub(outputs.y[:, here], output.mean_y, out=weight).mul_(p), x, u, powers, of_l)
            x_held = torch.addcmul(x, x_along_v, v_here, value=-1, out=scratch.empty("held", tokens, size))
            u_held = u - (u_along_v / self._scale)[:, None] * v_here
            _add_up(weight.copy_(p), x_held, u_held, powers, held)
            _add_up(p, x, u, powers, of_p)

        on_all_cores(measure, range(parts), v.device)
        return _Moments.of(*(part.sum(dim=0).double() for part in (of_p, of_l, held, of_v)), biased=biased)

    def _find_largest(self, outputs: FullOutputs, move: Move, into: Tensor) -> Tensor:
        """Find the largest of the moved logits, and the one that was the largest before, up to a constant.

        Look for it where the logits are the largest.

        Returns:
            Whether no other logit can be larger, bool ``[tokens, n_neurons]``.
        """
        y, along, write = outputs.y, move.along[0], move.write
        in_stretches = y.shape[1] // STRETCH * STRETCH
        highest = y[:, :in_stretches].unflatten(1, (-1, STRETCH)).amax(dim=-1)
        best = highest.topk(min(STRETCHES + 1, highest.shape[1]))
        within = torch.arange(STRETCH, device=y.device)
        ids = (best.indices[:, :STRETCHES, None] * STRETCH + within).flatten(1)
        rest = torch.arange(in_stretches, y.shape[1], device=y.device).expand(len(y), -1)
        ids = torch.cat([ids, rest], dim=1)
        y_there, x_there = y.gather(1, ids)[:, None], outputs.x[0].gather(1, ids)[:, None]
        before = (ids == outputs.argmax[:, None]).int().argmax(dim=1)[:, None, None]
        for neurons in self._readout.blocks(len(self._u), ids.numel()):
            moved = torch.addcmul(y_there, along[:, neurons, None], x_there)  # [tokens, neurons, ids]
            moved.addcmul_(write[:, neurons, None], self._u[neurons][:, ids].movedim(0, 1))
            into[:, 0, neurons] = moved.amax(dim=-1)
            into[:, 1, neurons] = moved.gather(2, before.expand(-1, moved.shape[1], 1))[..., 0]
        if highest.shape[1] <= STRETCHES:
            return torch.ones_like(along, dtype=torch.bool)
        # Bound what all other logits can gain on the largest.
        (lowest_u, highest_u), bias = self._range, self._readout.logit_bias
        gain = along.abs() * (bias.amax() - bias.amin()) + write.abs() * (highest_u - lowest_u)
        below = y.gather(1, outputs.argmax[:, None]) - best.values[:, STRETCHES:]
        certain: Tensor = gain < (1 + along) * below
        return certain

    def _slopes(self, outputs: FullOutputs, moments: _Moments) -> TokenSlopes:
        """Compute the slopes: ``dH = −Cov(l, dz)`` and ``dKL(P ‖ P_freq) = Cov(l − log p_freq, dz)``."""
        slope = self._readout.slope(outputs.state)
        scaled = Move((slope.along[0].double(),), slope.write.double() * self._scale)
        entropy = -scaled.linear(moments.of_l[0, 1, None], moments.of_l[1, 0])
        return TokenSlopes(entropy, -entropy - self._unigram.length * scaled.linear(moments.cov_xv[None], moments.cov_uv))


class _Output(NamedTuple):
    """Normalisers and centres of the unsteered output at some tokens, and how far it goes from the centre: ``[tokens, 1]``."""

    log_z: Tensor
    mean_x: Tensor
    mean_y: Tensor
    farthest_x: Tensor
    farthest_l: Tensor


class _Moments(NamedTuple):
    """Moments ``Σ p u^i x^j``, ``[i, j, tokens, n_neurons]``. ``u`` and ``x`` are centred, and ``u`` is over its scale."""

    of_p: Tensor
    of_l: Tensor
    """The same with the weights ``p l``."""
    held: Tensor
    """Those of the ``u`` and ``x`` held along ``v``."""
    mean_u: Tensor
    """Mean of ``u`` before it was centred, ``[tokens, n_neurons]``."""
    cov_xv: Tensor
    cov_uv: Tensor

    @classmethod
    def of(cls, of_p: Tensor, of_l: Tensor, held: Tensor, of_v: Tensor, *, biased: bool) -> _Moments:
        """Centre moments by `_add_up`, and ``Σ p v``, ``Σ p v u`` and ``Σ p v x`` in `of_v` ``[2 + n_neurons, tokens]``."""
        n = len(of_v) - 2
        raw = _by_powers(of_p, n)
        total, mean_u = raw[0, 0], raw[1, 0] / raw[0, 0]
        mean_v, mean_xv = of_v[[0, -1], :, None] / total
        p = _centred(raw / total, mean_u)
        with_l = _centred(_by_powers(of_l, n) / total, mean_u) if biased else p[:, 1:]
        mean_uv = of_v[1:-1].T / total
        return cls(p, with_l, _centred(_by_powers(held, n) / total, mean_u), mean_u, mean_xv, mean_uv - mean_u * mean_v)


def _add_up(weight: Tensor, x: Tensor, u: Tensor, powers: Tensor, into: Tensor) -> None:
    """Add ``weight u^i x^j``, summed over a stretch of the vocabulary, for ``i + j`` up to the last ``j``.

    Args:
        weight: ``[tokens, columns]``; overwritten.
        x: ``[tokens, columns]``
        u: ``[n_neurons, columns]``
        powers: memory for the powers of `u`, the zeroth only once: ``[1 + n_neurons · ORDER, columns]``.
        into: ``[j, 1 + n_neurons · ORDER, tokens]``
    """
    n, columns = u.shape
    powers[0] = 1
    by_power = powers[1:].view(ORDER, n, columns)
    by_power[0] = u
    for i in range(1, ORDER):
        torch.mul(by_power[i - 1], u, out=by_power[i])
    for j, sums in enumerate(into):
        rows = 1 + n * min(ORDER, len(into) - 1 - j)
        sums[:rows].addmm_(powers[:rows], weight.T)
        weight.mul_(x)


def _by_powers(sums: Tensor, n: int) -> Tensor:
    """Sums ``[j, 1 + n_neurons · ORDER, tokens]`` as ``[i, j, tokens, n_neurons]``."""
    of_x, of_u = sums[:, :1], sums[:, 1:].unflatten(1, (ORDER, n))
    return torch.cat([of_x[:, :, None].expand(-1, -1, n, -1), of_u], dim=1).permute(1, 0, 3, 2)


def _centred(moments: Tensor, mean_u: Tensor) -> Tensor:
    """Moments of ``u − mean_u``, from those of ``u``, by the binomial theorem."""
    return torch.stack(
        [
            torch.stack([math.comb(i, k) * (-mean_u) ** (i - k) * moments[k] for k in range(i + 1)]).sum(dim=0)
            for i in range(len(moments))
        ]
    )


def _terms(moments: Tensor, move: Move) -> Tensor:
    """Terms ``E_p[Δ^k]/k!`` of the series, ``[k, …, tokens, n_neurons]``."""
    write, along = move.write, move.along[0]

    def term(i: int, j: int) -> Tensor:
        return write**i * along**j * moments[i, j] / (math.factorial(i) * math.factorial(j))

    return torch.stack([torch.stack([term(i, k - i) for i in range(k + 1)]).sum(dim=0) for k in range(ORDER + 1)])
