"""Folders that hold something else than a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from confsteer import LoadError, load_model, scan
from confsteer.model.loading import DEMO


def test_an_adapter_alone_is_called_one_with_the_model_it_is_for(tmp_path: Path) -> None:
    """With a tokenizer beside it and without: transformers has other words for each, none of them true."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sentence = r"it holds an adapter \(PEFT\) for someone/base, not a model\. .*merge_and_unload"
    for name in (None, "tokenizer.json", "tokenizer_config.json"):
        if name is not None:
            shutil.copy(DEMO / name, tmp_path)
        with pytest.raises(LoadError, match=sentence):
            load_model(str(tmp_path))
    with pytest.raises(LoadError, match=sentence):
        scan(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LoadError, match="cannot load"):
        load_model(str(tmp_path))
