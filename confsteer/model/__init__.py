"""A transformers model, in memory or on disk: where its last layer is, and the states that a text leaves there.

layers.py       any linear layer or norm, plain, quantised, offloaded or under an adapter, as tensors
anatomy.py      the modules at the end of a model, folded into a Readout
experts.py      the same for a mixture of experts
experts_on_disk.py   output weights of experts on disk, one expert at a time
factors.py      scalars between the last MLP and the logits, by the name that each family gives them
locate.py       finds the modules by what the model calls, and in which order
dissect.py      proves numerically that the model at hand is what was found
states.py       forward passes over windows, and over answers to questions
sampling.py     text that the model itself writes
loading.py      models and tokenizers by hub id, by folder, by GGUF file, or the bundled ones
gguf.py         GGUF files: metadata, single tensors, and what transformers leaves out of one
gguf_weights.py all weights of a GGUF file, with the names and shapes of transformers
checkpoint.py   the last layer of a model on disk, without the rest
"""
