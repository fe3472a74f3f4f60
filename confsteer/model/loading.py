"""Models by hub id, by folder, by GGUF file, or the bundled one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from confsteer.errors import ConfsteerError, LoadError, UnsupportedModelError
from confsteer.model import gguf
from confsteer.model.gguf import GgufFile
from confsteer.model.gguf_weights import NORM_OFFSET, state_dict

DEMO = Path(__file__).parents[1] / "demo" / "model"
"""Folder of the bundled demonstration model."""
DEMO_NAME = "confsteer-demo"
DEMO_UNIGRAM = Path(__file__).parents[1] / "demo" / "unigram.npy"
"""Token counts of the text that it was trained on."""


class LoadedModel(NamedTuple):
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def load_processor(self) -> ProcessorMixin:
        """Load what makes the model's inputs of images and text, from where the model is.

        Raises:
            LoadError: there is none, as of a model that sees nothing, or it cannot be loaded.
        """
        source, commit = self.model.config.name_or_path, getattr(self.model.config, "_commit_hash", None)
        try:
            processor = AutoProcessor.from_pretrained(source, revision=commit)
        except Exception as error:  # as many kinds as of a model
            raise LoadError(f"cannot load the processor of {source}, which images need: {reason(error)}") from error
        if not isinstance(processor, ProcessorMixin):
            raise LoadError(f"a conversation has an image, and {source} has no processor for images: it reads text alone")
        return processor


def load_model(
    name: str | None,
    *,
    gguf_file: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model, which may be multimodal, in evaluation mode, with its tokenizer.

    Args:
        name: hub id, folder or ``.gguf`` file; the bundled demonstration model if None.
        gguf_file: GGUF file to load from that hub repository or folder. Its weights are dequantised.
        device: ``cpu``, ``cuda``, ``cuda:1``, …, or ``auto`` to spread the model over all devices. None: CUDA if there is a GPU,
            otherwise the CPU.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own. A GGUF file's own is float32.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        LoadError: there is no such model, it cannot be loaded, or its checkpoint lacks weights. Or transformers would make a
            different model from a GGUF file.
        UnsupportedModelError: it is an encoder-decoder.
    """
    source = source_of(name, gguf_file)
    file = gguf.find(source, gguf_file, revision)
    if device is None:
        # Give each of several processes on a machine a GPU of its own.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    how: dict[str, Any] = {"device_map": device, "output_loading_info": True}
    if file is not None:
        return _load_gguf(file, "float32" if dtype == "auto" else dtype, how)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(
                f"{source} ({config.model_type}) is an encoder-decoder; confsteer steers decoder-only causal language models"
            )
        loaded: Any = auto_class(config).from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
            **how,
        )
        model, found = loaded
        # Note the commit: transformers does not keep it.
        model.config._commit_hash = extract_commit_hash(str(cached_file(source, CONFIG_NAME, revision=revision)), None)
    except ConfsteerError:
        raise
    except Exception as error:  # transformers raises many kinds: of a config alone TypeError, KeyError, ZeroDivisionError, …
        raise LoadError(f"cannot load {source}: {why_not(error, source, revision)}") from error
    _check_none_missing(found["missing_keys"], source)
    if name is None:
        model.config.name_or_path = DEMO_NAME
    return LoadedModel(model.eval(), tokenizer)


def auto_class(config: Any) -> Any:
    """Choose the auto class that loads a model: the one for multimodal models if no other knows the config."""
    multimodal = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def source_of(name: str | None, gguf_file: str | None) -> str:
    """Choose where a model is read from: the bundled one if `name` is None.

    Raises:
        LoadError: a GGUF file is asked for, but no repository is named.
    """
    if name is None and gguf_file is not None:
        raise LoadError(f"{gguf_file} is a file of which model? Give OWNER/REPO, or the path of the file in place of a model")
    return str(DEMO) if name is None else name


def _check_none_missing(names: set[str], source: str) -> None:
    """Raise LoadError if the checkpoint lacks weights: transformers fills them with random numbers."""
    if missing := sorted(names):
        raise LoadError(
            f"the checkpoint of {source} is incomplete, or not of this kind of model: it lacks {len(missing)} of its weights, "
            f"such as {missing[0]}"
        )


def _load_gguf(file: GgufFile, dtype: str, how: dict[str, Any]) -> LoadedModel:
    """Load a GGUF file with ordinary weights. `how` are further arguments of ``from_pretrained``."""
    tokenizer = load_tokenizer(file.name, file=file)
    config = gguf_config(file)
    loaded: Any
    with _gguf_errors(file):
        if file.architecture in NORM_OFFSET:
            weights = state_dict(file, config, getattr(torch, dtype))
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded = kind.from_pretrained(None, config=config, state_dict=weights, dtype=getattr(torch, dtype), **how)
        else:
            loaded = _load_gguf_slowly(file, config, dtype=getattr(torch, dtype), **how)
    model, found = loaded
    _check_none_missing(found["missing_keys"], file.name)
    gguf.check_all_used(model, config, file)
    model.config.name_or_path, model.config._commit_hash = file.name, file.commit
    model.generation_config.eos_token_id = gguf.ends_of_text(file) or None
    return LoadedModel(model.eval(), tokenizer)


def _load_gguf_slowly(file: GgufFile, config: Any, **how: Any) -> Any:
    """Let transformers read all weights of a file. `how` are further arguments of ``from_pretrained``."""
    # Ask for dequantised weights: otherwise transformers keeps the blocks, which nothing here can read.
    dequantised = transformers.GgufConfig(dequantize=True)
    with gguf.alone(file) as place:
        return AutoModelForCausalLM.from_pretrained(**place, config=config, quantization_config=dequantised, **how)


def gguf_config(file: GgufFile) -> Any:
    """Read the config of the model in a GGUF file.

    Raises:
        LoadError: transformers cannot read the architecture, or some of its settings in the file.
    """
    with _gguf_errors(file), gguf.alone(file, settings=True) as place:
        config: Any = AutoConfig.from_pretrained(**place)
        gguf.complete_config(config, file)
    config.name_or_path = file.name
    return config


@contextlib.contextmanager
def _gguf_errors(file: GgufFile) -> Iterator[None]:
    """Turn an error of transformers about a file into a LoadError that names the file's architecture."""
    try:
        yield
    except ConfsteerError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise LoadError(
            f"transformers {transformers.__version__} cannot read {file.name}, whose architecture is {file.architecture}: "
            f"{reason(error)}. Give the checkpoint that the file was made from, or try a newer transformers"
        ) from error


def load_tokenizer(
    source: str, *, file: GgufFile | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id or folder, or of a GGUF file.

    Raises:
        LoadError: there is none, or it cannot be loaded.
    """
    tokenizer: PreTrainedTokenizerBase
    if file is not None:
        kind: Any = AutoTokenizer
        if file.architecture in NORM_OFFSET:
            # Choose the class as AutoTokenizer does, which would read the file once more.
            kind = TOKENIZER_MAPPING.get(type(gguf_config(file)), None)
            kind = kind if kind and issubclass(kind, PreTrainedTokenizerFast) else PreTrainedTokenizerFast
        with _gguf_errors(file), gguf.alone(file) as place:
            tokenizer = kind.from_pretrained(**place)
            gguf.obey(tokenizer, file)
        return tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as many kinds as of a model
        raise LoadError(f"cannot load the tokenizer of {source}: {why_not(error, source, revision)}") from error
    return tokenizer


def why_not(error: Exception, source: str, revision: str | None) -> str:
    """Say why `source` cannot be loaded, and what to load instead if it is known not to be a model."""
    with contextlib.suppress(Exception):  # what is wrong with it is said below
        if file := find_adapter_config_file(source, revision=revision):
            base = str(json.loads(Path(file).read_bytes())["base_model_name_or_path"])[:100]
            return (
                f"it holds an adapter (PEFT) for {base}, not a model. Load that and put the adapter on it, in Python; or save "
                "the two as one model, with merge_and_unload() and save_pretrained()"
            )
    return reason(error) + gguf.hint(source)


def reason(error: Exception) -> str:
    """Put an error message of transformers on one line. It may be pages long and begin with a blank line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:299] + "…"
