"""The words of vLLM's command line that configure confsteer. It imports little, because every process of vLLM may ask."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

CONFIG_KEY = "confsteer"
"""Key of vLLM's ``additional_config``, and of a request's ``vllm_xargs`` or ``extra_args``."""
CONFIG_OPTION = "--additional-config"


def resembles(name: Any, word: str) -> bool:
    """Whether a name is `word`, or that misspelt: vLLM takes unknown names and says nothing."""
    return isinstance(name, str) and bool(difflib.get_close_matches(name.lower(), [word], cutoff=0.8))


class Given(NamedTuple):
    """Words that give ``additional_config`` or a part of it."""

    at: int
    """Index of the first word; −1 for a file."""
    words: int
    """Number of words; 0 for a file."""
    key: str
    """The part, such as ``confsteer.profile`` in ``--additional-config.confsteer.profile``. Empty for the whole."""
    value: str


def given_configs(words: Sequence[str]) -> Iterator[Given]:
    """List all parts of ``additional_config`` in `words`. The configuration file comes first, because vLLM reads it first."""
    for name, value in config_file(words).items():
        option, _, key = f"--{name}".replace("_", "-").partition(".")
        if option == CONFIG_OPTION:
            yield Given(-1, 0, key, value if isinstance(value, str) else json.dumps(value))
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        option, _, key = name.partition(".")
        if option.replace("_", "-") == CONFIG_OPTION:
            yield Given(at, 1 if equals else 2, key, value if equals else "".join(words[at + 1 : at + 2]))


def config_file(words: Sequence[str]) -> dict[str, Any]:
    """Read the options in the file of ``--config``. Empty if there is no such file: vLLM has an error of its own for that."""
    if "--config" not in words[:-1]:
        return {}
    import yaml  # vLLM has it

    try:
        with open(words[words.index("--config") + 1], encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def ask_for_confsteer(words: Sequence[str]) -> bool:
    """Whether a command line names confsteer in ``additional_config``, even in a word that a later one replaces."""
    return any(
        given.key.partition(".")[0] == CONFIG_KEY or (not given.key and f'"{CONFIG_KEY}"' in given.value)
        for given in given_configs(words)
    )
