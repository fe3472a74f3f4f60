"""Architectures that people serve are dissected as the committed table says.

``CENSUS=all pytest tests/model/test_census.py`` goes over all of them, as ``python eval/census.py`` does, in a minute.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

import click
import pytest
import transformers

from tests.paths import ROOT
from tests.scripts import load_script

SERVED = [
    "aya_vision", "bamba", "cohere2", "cohere2_vision", "deepseek_v3", "ernie4_5", "falcon_h1", "gemma3", "gemma4", "glm4v",
    "gpt_oss", "granite4_vision", "hunyuan_v1_dense", "idefics3", "internvl", "kimi_k25", "lfm2", "lfm2_vl", "llama4",
    "llava_next", "llava_onevision", "minicpm3", "ministral3", "mistral3", "mixtral", "mllama", "nemotron_h", "nemotron_h_omni",
    "olmo_hybrid", "paligemma", "qwen2_5_omni_thinker", "qwen2_vl", "qwen3_5", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
]  # fmt: skip
"""Beside those of `tests.models`, which have tests of their own."""


@pytest.fixture(scope="module")
def census() -> ModuleType:
    return load_script("census")


def test_the_readme_and_the_page_say_what_the_table_says(census: ModuleType) -> None:
    rows, versions = census.read()
    assert (ROOT / "README.md").read_text().split(census.MARK)[1].strip() == census.sentence(rows, versions)
    assert census.page(rows, versions) == (ROOT / "eval" / "census.md").read_text()
    assert not [row for row in rows if row.verdict == "crash"]
    assert sum(row.verdict == "unbuilt" for row in rows) < 15


def test_a_type_that_transformers_does_not_have_is_refused(census: ModuleType) -> None:
    with pytest.raises(click.BadParameter, match="no language model of type lama"):
        census.main(["lama", "llama"], standalone_mode=False)


def test_architectures_are_dissected_as_the_table_says(census: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    rows, versions = census.read()
    if versions["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {versions['transformers']}")
    caplog.set_level(logging.ERROR)
    expected = {(row.kind, row.model_type): (row.verdict, row.on_disk) for row in rows}
    every = os.environ.get("CENSUS") == "all"
    found = {}
    for kind, model_type, auto in census.types():
        if every or model_type in SERVED:
            row = census.look_at(kind, model_type, auto)
            found[kind, model_type] = (row.verdict, row.on_disk)
    assert every or {model_type for _, model_type in found} == set(SERVED)
    assert found == {key: expected[key] for key in found}
