"""``GET /confsteer``: what this server can steer. vLLM adds a plugin's routes only if ``VLLM_PLUGINS`` names the plugin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException

from confsteer.profile.dials import example_effects
from confsteer.runtimes.vllm.settings import Settings


def public_name(source: str) -> str:
    """A hub id or a shipped name as it is; the last part of a path, which is nobody's business."""
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and not Path(source).exists()
    return source if named else Path(source).absolute().name


def describe(settings: Settings) -> dict[str, Any]:
    """The profile, its neurons, the ranges of its dials, their effects at four settings, presets and the default, for JSON."""
    profile = settings.load_profile()
    return {
        "version": settings.version,
        "profile": public_name(settings.profile),
        "checksum": settings.checksum,
        "model": public_name(profile.model.id),
        "layer": profile.model.layer,
        "dials": {
            dial: {
                "unit": "nats",
                "range": profile.reach(dial),
                "effects": [effect._asdict() for effect in example_effects(profile, dial)],
                "neurons": [neuron.key for neuron in profile.neurons(dial)],
            }
            for dial in profile.response
        },
        "presets": {name: str(steering) for name, steering in profile.presets.items()},
        "default": settings.default or None,
    }


class Endpoint:
    """An ``EndpointPlugin``."""

    name = "confsteer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        def confsteer() -> Any:
            """Describe what this server can steer."""
            if app.state.confsteer is None:
                raise HTTPException(404, "this server was started without a confsteer profile")
            return app.state.confsteer

        app.add_api_route("/confsteer", confsteer)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        settings = None if engine_client is None else Settings.of(engine_client.vllm_config.additional_config)
        state.confsteer = None if settings is None else describe(settings)
