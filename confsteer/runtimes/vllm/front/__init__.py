"""vLLM's front process: its configuration, the check of requests, and what an operator can see."""
