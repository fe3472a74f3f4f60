"""Cosine of neurons' writes with the unigram direction, and its level by chance.

Source: Stolfo et al. 2024 (arXiv 2406.16254), section 4: a token-frequency neuron adds to every logit an amount
proportional to the token's log frequency.
"""

from __future__ import annotations

import torch
from torch import Tensor

from confsteer.last_layer.readout import Readout
from confsteer.last_layer.unigram import Unigram

MEDIAN_COUNT = 10
"""Least count of the median token at which counts rank tokens.

The log frequency of a token counted ``c`` times is known to ``1/√c`` nats. The counts behind the bundled model (4,096 token ids,
7.4 million tokens) were sampled, and the unigram directions compared. The cosine of a sample's with the whole's is 0.74 where
the median token is counted 2 times (25,000 tokens). It is 0.88 where it is counted 7 times, and 0.93 for 15 times.
"""


def ranks_tokens(counts: Tensor) -> bool:
    """Whether counts ``[vocab]`` are of enough tokens to tell frequent from rare for most of the vocabulary."""
    return bool(counts.median() >= MEDIAN_COUNT)


def frequency_cosine(readout: Readout, unigram: Unigram) -> Tensor:
    """``cos(W_U w_i, v)`` of every neuron's write to the logits with the unigram direction, ``[n_neurons]`` float64 on the CPU.

    Both are centred over the vocabulary, because a constant added to all logits does not change the output.
    """
    return _cosine(readout, unigram, readout.w_out.double()).cpu()


def chance_frequency_cosine(readout: Readout, unigram: Unigram, *, seed: int = 0) -> float:
    """Estimate the ``|cos(W_U w, v)|`` that the largest of ``n_neurons`` random writes exceeds 1 time in 20."""
    # Draw in the eigenvectors of that matrix: a random direction is as random there, and its length needs no product.
    squares, vectors = torch.linalg.eigh(_logit_gram(readout))
    along_v = vectors.T @ (unigram.direction @ readout.unembedding).double()
    generator = torch.Generator().manual_seed(seed)
    largest = []
    for _ in range(20):
        write = torch.randn((readout.n_neurons, readout.d_model), generator=generator).to(squares)
        length = (write.square() @ squares.clamp_min(0)).sqrt()
        largest.append(((write @ along_v) / length.clamp_min(torch.finfo(length.dtype).tiny)).abs().max())
    return float(torch.stack(largest).quantile(0.95).clamp_max(1))


def _logit_gram(readout: Readout) -> Tensor:
    """``wᵀ G w`` is the squared length of a logit write less its mean over the vocabulary, float64 ``[d_model, d_model]``."""
    # The mean is zero unless the model has a softcap: only then is the unembedding left uncentred.
    mean = readout.unembedding.mean(dim=0).double()
    return readout.gram - readout.vocab_size * torch.outer(mean, mean)


def _cosine(readout: Readout, unigram: Unigram, w_out: Tensor) -> Tensor:
    """Cosines of the logit writes of ``w_out`` ``[n, d_model]`` with ``v``. A write that does not reach the logits has zero."""
    length = ((w_out @ _logit_gram(readout)) * w_out).sum(dim=1).clamp_min(0).sqrt()
    cosine = (w_out @ (unigram.direction @ readout.unembedding).double()) / length.clamp_min(torch.finfo(length.dtype).tiny)
    negligible = length <= 1e-6 * length.max()  # float32 rounding
    return torch.where(negligible, 0.0, cosine).clamp(-1, 1)  # rounding
