"""The search for neurons that regulate confidence (Stolfo et al. 2024, arXiv 2406.16254). Tensors only.

weights.py      statistics of the weights: norm, logit variance, null space
moments.py      moments of the output distribution and of the neurons' writes
effects.py      the effect of ablating each neuron, by a cumulant expansion
exact.py        the same exactly, where the expansion is not good enough
frequency.py    how far neurons write along the unigram direction
streaming.py    averages over a stream of tokens, with standard errors
select.py       which neurons are entropy neurons and token-frequency neurons
response.py     what a dial does at each of its positions
temperature.py  the entropy by temperature, and which temperature a change of it amounts to
"""
