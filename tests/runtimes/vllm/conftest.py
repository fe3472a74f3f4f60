"""Tests of engines run where vLLM is installed; the others, of what knows nothing of vLLM, everywhere.

With ``VLLM_USE_V2_MODEL_RUNNER=1`` the engines run vLLM's second model runner, whose kernels are Triton's: without a GPU,
Triton's interpreter runs them on the CPU, in this process and no other: ``-m "not processes"``.
"""

import importlib.util
import os
from types import SimpleNamespace

# Before vLLM is imported.
os.environ.update(
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)
if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["test_engine.py", "test_server.py", "test_examples.py"]
elif os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    # vLLM looks for a driver before it looks at the interpreter.
    backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True)))
