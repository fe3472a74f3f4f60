"""Models by hub id, by folder, or the bundled one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from confsteer.errors import ConfsteerError

DEMO = Path(__file__).parent / "demo" / "model"
"""Folder of the bundled demonstration model."""
DEMO_NAME = "confsteer-demo"
DEMO_UNIGRAM = Path(__file__).parent / "demo" / "unigram.npy"
"""Token counts of the text it was trained on."""


class LoadedModel(NamedTuple):
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model(
    name: str | None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A causal language model in evaluation mode, with its tokenizer.

    Args:
        name: hub id or folder; the bundled demonstration model if None.
        device: ``cpu``, ``cuda``, ``cuda:1``, …, or ``auto`` to spread the model over what there is; CUDA if there is one,
            the CPU otherwise, if None.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfsteerError: there is no such model, or it cannot be loaded.
    """
    source = str(DEMO) if name is None else name
    if device is None:
        # Of several processes on a machine, each has a GPU of its own.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        # transformers does not keep the commit it loaded.
        model.config._commit_hash = extract_commit_hash(str(cached_file(source, CONFIG_NAME, revision=revision)), None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfsteerError(f"cannot load {source}: {error}") from error
    if name is None:
        model.config.name_or_path = DEMO_NAME
    return LoadedModel(model.eval(), tokenizer)
