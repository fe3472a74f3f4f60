"""Tests of engines run where vLLM is installed; the others, of what knows nothing of vLLM, everywhere."""

import importlib.util
import os

# Before vLLM is imported.
os.environ.update(
    VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", TRANSFORMERS_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING"
)
if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["test_admission.py", "test_batch.py", "test_engine.py", "test_server.py"]
