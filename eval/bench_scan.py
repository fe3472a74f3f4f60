"""What ``confsteer scan`` costs on a checkpoint with the shape of a 7B model: time, memory, and how much of it is read.

The checkpoint is LLaMA-2 7B's, tensor by tensor (width 4096, 11,008 neurons, 32,000 tokens, 32 layers, bfloat16), in shards of
5 GB. The unembedding, the final norm and the last projection hold random numbers, with a null space of 40 dimensions and five
neurons that write into it. The other tensors of their shard are zeros; a shard with none of them is a hole as large, without a
header, so that to open it is an error. The files are dropped from the page cache before each run, and what the process then gets
from the disk is counted: an upper bound of what it reads of the checkpoint, for its libraries count where they are not cached.

    python eval/bench_scan.py
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from confsteer import Profile
from confsteer.discovery.select import candidates

SHARD_BYTES = 5_000_000_000
NULL_DIMS = 40
PLANTED = (7, 1000, 4321, 8000, 11_007)


def weights() -> dict[str, Tensor]:
    """The tensors that are read; the last dimensions of the residual are the unembedding's null space."""
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(32_000, 4096, generator=generator) * 0.02
    unembedding[:, -NULL_DIMS:] = 0
    projection = torch.randn(4096, 11_008, generator=generator) * 0.02
    projection[:-NULL_DIMS, PLANTED] = 0
    tensors = {"lm_head.weight": unembedding, "model.layers.31.mlp.down_proj.weight": projection}
    tensors["model.norm.weight"] = 1 + 0.1 * torch.randn(4096, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def write_checkpoint(folder: Path) -> int:
    """The checkpoint in `folder`, and the size of its tensors in bytes."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16")  # its defaults are LLaMA-2 7B's
    config.save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(config.vocab_size)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: list[dict[str, Any]] = []
    end = SHARD_BYTES
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    real, total = weights(), 0
    weight_map: dict[str, str] = {}
    for number, header in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)  # the format aligns its data
        last = max(tensor["data_offsets"][1] for tensor in header.values())
        with file.open("wb") as stream:
            if header.keys() & real.keys():
                stream.write(len(text).to_bytes(8, "little") + text)
                for name, entry in header.items():
                    if name in real:
                        real[name].view(torch.uint8).numpy().tofile(stream)
                    else:
                        stream.write(bytes(entry["data_offsets"][1] - entry["data_offsets"][0]))
            else:
                stream.truncate(8 + len(text) + last)
            stream.flush()
            os.fsync(stream.fileno())
        weight_map |= dict.fromkeys(header, file.name)
        total += last
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def drop_from_cache(file: Path) -> None:
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.option("--runs", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
def main(runs: int, out: Path) -> None:
    """Scan the checkpoint in a process of its own and write what it took."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        model, profile = Path(temporary) / "model", Path(temporary) / "profile"
        model.mkdir()
        total = write_checkpoint(model)
        shards = sorted(model.glob("*.safetensors"))
        command = [sys.executable, "-m", "confsteer", "scan", str(model), "--out", str(profile)]
        for _ in range(runs):
            for shard in shards:
                drop_from_cache(shard)
            load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            read = 512 * (after.ru_inblock - before.ru_inblock)
            found = Profile.load(profile)
            assert sorted(candidates(found.weights)) == sorted(PLANTED), candidates(found.weights)
            row = {
                "seconds": round(seconds, 1),
                "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                "load_before": round(load, 2),
                "peak_rss_gb_of_runs_so_far": round(after.ru_maxrss * 1024 / 1e9, 2),
                "read_mb": round(read / 1e6, 1),
                "share_of_checkpoint": round(read / total, 4),
                "null_dims": found.layer.null_dims,
            }
            rows.append(row)
            click.echo(json.dumps(row))
    context = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "checkpoint_gb": round(total / 1e9, 2),
    }
    out.write_text(json.dumps({"context": context, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
