"""The search for neurons that regulate confidence (Stolfo et al. 2024, arXiv 2406.16254). Tensors only.

weights.py        statistics of the weights: norm, logit variance, null space
moments.py        moments of the output distribution and of the neurons' writes
effects.py        the effect of ablating each neuron, by a cumulant expansion
second_order.py   the expansion to second order, of whole layers or chosen pairs
pairs.py          pairs of a token and a neuron for which that is not good enough
token_effects.py  effects at single tokens, and the sums over the vocabulary that they follow from
exact.py          effects of a few neurons exactly
series.py         their sums over the vocabulary by a power series, where it converges
exponentials.py   the same by an exponential for each entry
frequency.py      how far neurons write along the unigram direction
streaming.py      averages over a stream of tokens, with standard errors
groups.py         the same where neurons are active on different tokens, as in a mixture of experts
select.py         which neurons are entropy neurons and token-frequency neurons
response.py       the effect of a dial at each of its positions
null_direction.py an entropy neuron made by hand
temperature.py    the entropy at each temperature, and the temperature that equals a change of it
"""
