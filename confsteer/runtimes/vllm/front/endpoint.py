"""Routes of the server: ``GET /confsteer`` says what it can steer, and ``GET /confsteer/play`` is a page to try it.

vLLM adds a plugin's routes only if ``VLLM_PLUGINS`` names the plugin.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse

from confsteer.playground.description import describe, public_name
from confsteer.playground.page import PATH, page
from confsteer.runtimes.vllm.settings import Settings


def description(settings: Settings) -> dict[str, Any]:
    """Describe the profile, what it can steer, and the default, for JSON."""
    return {
        "version": settings.version,
        "profile": public_name(settings.profile),
        "checksum": settings.checksum,
        **describe(settings.load_profile()),
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

        def play() -> Any:
            """Show the page. It asks this server as any client does."""
            confsteer()
            return HTMLResponse(page())

        app.add_api_route("/confsteer", confsteer)
        app.add_api_route(PATH, play, response_class=HTMLResponse)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        settings = None if engine_client is None else Settings.of(engine_client.vllm_config.additional_config)
        state.confsteer = None if settings is None else description(settings)
