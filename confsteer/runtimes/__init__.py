"""One rule, several engines: a steering in a transformers model, in weights, in vLLM, in llama.cpp.

transformers.py    a context around ``generate()``, ``forward`` or a pipeline
experts.py         the same in a mixture of experts, whatever kernel runs it
passes.py          the positions of a forward pass that generate, and a check that the pass is steered
positions.py       windows of generated tokens: the same in every engine
following.py       these in transformers: the tokens that generate() has generated before each of its passes
generations.py     a prompt continued with each of several steerings
continuations.py   many prompts continued under several steerings, in batches
linear.py          the steerings that weights can hold
baking.py          a steering folded into weights, and checkpoints of the result
completions.py     completions of a transformers model, token by token, for several clients
local_server.py    these over HTTP, on this machine only, with the page
llamacpp/          control vectors, LoRAs and GGUF files
vllm/              a steering per request, in the graph that vLLM compiles
"""
