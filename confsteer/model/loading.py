"""Models by hub id, by folder, or the bundled one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from confsteer.errors import ConfsteerError, LoadError, UnsupportedModelError

DEMO = Path(__file__).parents[1] / "demo" / "model"
"""Folder of the bundled demonstration model."""
DEMO_NAME = "confsteer-demo"
DEMO_UNIGRAM = Path(__file__).parents[1] / "demo" / "unigram.npy"
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
        LoadError: there is no such model, or it cannot be loaded, or its checkpoint lacks weights.
        UnsupportedModelError: it is an encoder-decoder.
    """
    source = str(DEMO) if name is None else name
    if device is None:
        # Of several processes on a machine, each has a GPU of its own.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(
                f"{source} ({config.model_type}) is an encoder-decoder; confsteer steers decoder-only causal language models"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, found = loaded
        # transformers does not keep the commit it loaded.
        model.config._commit_hash = extract_commit_hash(str(cached_file(source, CONFIG_NAME, revision=revision)), None)
    except ConfsteerError:
        raise
    except Exception as error:  # transformers raises many kinds: of a config alone TypeError, KeyError, ZeroDivisionError, …
        raise LoadError(f"cannot load {source}: {reason(error)}") from error
    if missing := sorted(found["missing_keys"]):
        # transformers fills them with random numbers.
        raise LoadError(
            f"the checkpoint of {source} is incomplete, or not of this kind of model: it lacks {len(missing)} of its weights, "
            f"such as {missing[0]}"
        )
    if name is None:
        model.config.name_or_path = DEMO_NAME
    return LoadedModel(model.eval(), tokenizer)


def load_tokenizer(source: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder.

    Raises:
        LoadError: there is none, or it cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # as many kinds as of a model
        raise LoadError(f"cannot load the tokenizer of {source}: {reason(error)}") from error
    return tokenizer


def reason(error: Exception) -> str:
    """What transformers says, which may go on for pages and begin with a blank line, on one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:299] + "…"
