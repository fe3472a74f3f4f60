"""These tests start vLLM engines, and run where vLLM is installed."""

import importlib.util
import os

# Before vLLM is imported.
os.environ.update(
    VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", TRANSFORMERS_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING"
)
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
