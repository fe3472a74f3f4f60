"""One rule, three engines: a steering in a transformers model, in weights, in vLLM.

transformers.py    a context around ``generate()``, ``forward`` or a pipeline
experts.py         the same in a mixture of experts, whatever kernel runs it
passes.py          which positions of a forward pass generate, and whether the pass is steered
generations.py     a prompt continued with each of several steerings
baking.py          a steering folded into weights, and checkpoints of the result
vllm/              a steering per request, in the graph that vLLM compiles
"""
