#!/usr/bin/env bash
# Two clients of a running server, at the same time and at different entropies. Start the server first:
#
#     confsteer serve --profile confsteer-demo --max-model-len 512        # or, where nothing is installed yet: make serve
#
# Usage: examples/vllm_server.sh [URL]
set -euo pipefail
url="${1:-http://localhost:8000}"
# The environment that `make serve` made has the OpenAI client.
python=python3
own="$(dirname "$0")/../.venv-vllm/bin/python"
if ! python3 -c 'import openai' 2> /dev/null && [ -x "$own" ]; then python="$own"; fi

echo "== What the server can steer"
curl -sf "$url/confsteer"
echo

echo "== Two requests with curl, in flight together"
ask() {
    curl -sf "$url/v1/completions" -H 'Content-Type: application/json' -d '{
        "model": "confsteer-demo", "prompt": "It was the best of times, it was", "max_tokens": 20, "temperature": 0, "logprobs": 0,
        "vllm_xargs": {"confsteer": "entropy='"$1"'"}}' \
        | "$python" -c 'import json, sys
choice = json.load(sys.stdin)["choices"][0]
nats, text = choice["logprobs"]["token_logprobs"], choice["text"]
print(f"entropy='"$1"': {sum(nats) / len(nats):+.2f} nats per token:{text!r}\n", end="")'  # in one write: the other client prints too
}
ask -0.2 & more=$!
ask +0.6 & less=$!
wait $more
wait $less

echo "== The same with the OpenAI client, streamed, sampled at temperature 1"
"$python" - "$url" <<'PYTHON' || echo "(pip install openai for this part)"
import asyncio
import sys

import openai

client = openai.AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")


async def ask(steering: str) -> str:
    stream = await client.completions.create(
        model="confsteer-demo",
        prompt="It was the best of times, it was",
        max_tokens=20,
        stream=True,
        extra_body={"vllm_xargs": {"confsteer": steering}},
    )
    return steering + ":" + "".join([chunk.choices[0].text async for chunk in stream])


async def main() -> None:
    print(*await asyncio.gather(ask('{"entropy": -0.2}'), ask('{"entropy": 0.6}')), sep="\n")


asyncio.run(main())
PYTHON

echo "== A steering that cannot be"
curl -s "$url/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "confsteer-demo", "prompt": "It", "vllm_xargs": {"confsteer": "entropy=9"}}'
echo
echo "== Counted"
curl -sf "$url/metrics" | grep '^confsteer.*_total'
