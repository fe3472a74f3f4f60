"""vLLM's front process: what is configured, what a request may ask for, what an operator can see."""
