"""The command to try the dials in a browser: play."""

from __future__ import annotations

import contextlib

import click

import confsteer
from confsteer.cli.options import ModelOptions, model_options, profile_option


@click.command(short_help="Feel the dials in a browser, neutral and steered side by side.")
@model_options
@profile_option
@click.option("--port", default=8008, show_default=True, type=click.IntRange(0, 65535), help="Of this machine; 0 for a free one.")
def play(chosen: ModelOptions, profile: str, port: int) -> None:
    """Serve a page that continues a prompt twice from the same seed, neutral and steered.

    \b
    confsteer play -p confsteer-demo
    confsteer play model.gguf -p my-profile --port 9000

    It is for one person: it listens only on this machine, and runs transformers. confsteer serve has the same page at
    /confsteer/play, on vLLM.
    """
    from confsteer.runtimes.completions import Completions
    from confsteer.runtimes.local_server import LocalServer

    found = confsteer.Profile.load(profile)
    model, tokenizer = chosen.load()
    with confsteer.steer(model, found) as steerer, LocalServer(Completions(model, tokenizer, steerer), found, port) as server:
        click.echo(f"Open {server.url} in a browser. Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
