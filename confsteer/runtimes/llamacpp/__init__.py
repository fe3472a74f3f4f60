"""The same steering for GGUF files: llama.cpp, LM Studio and other programs built on it.

parts.py       a steering as a constant after the last layer and as gains of neurons
adapters.py    GGUF files that stock llama.cpp reads: a control vector for the constant, a LoRA for the gains
per_nat.py     a dial as a control vector whose scale is in nats
after_norm.py  the entropy dial as a constant after the norm on the MLP's output, measured
ladder.py      several settings of a dial, a file for each
baking.py      a GGUF file with a steering in its weights
"""
