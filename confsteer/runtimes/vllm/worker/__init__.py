"""vLLM's worker process: the model is steered, and proved to be before it serves."""
