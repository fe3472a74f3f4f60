"""The last layer in closed form: the effect of any change at the end of a model on its predictions. Tensors only.

states.py         what a model leaves in its last layer at some tokens
experts.py        a mixture of experts: its neurons, and the tokens that each is active on
readout.py        from the last MLP's activations to the logits, norms and softcap included
unigram.py        the unigram distribution as a direction in logit space
cores.py          blocks of work side by side, each on a core of its own
edit.py           the rule of steering: clip(gain · a + bias, low, high)
intervention.py   a steering with the baselines beside it
coordinates.py    any intervention on a text in a few numbers per token
scores.py         scores of each next-token prediction
sample.py         the vocabulary sampled for each token, for fits and searches
text_states.py    a text under any intervention
"""
