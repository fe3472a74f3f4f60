"""Commands that steer: generate, bake, serve."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

import confsteer
from confsteer import defaults
from confsteer.cli.options import PROFILE, STEERING, ModelOptions, model_options, profile_option, steer_option
from confsteer.report import tables
from confsteer.report.printable import one_safe_line

if TYPE_CHECKING:
    from confsteer.profile.profile import Profile
    from confsteer.runtimes.generations import Generation
    from confsteer.steering import Steering


@click.command(short_help="Continue or answer one prompt at several settings.")
@click.argument("prompt")
@model_options
@profile_option
@steer_option
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Answer PROMPT through the chat template, or continue it as it stands.  [default: chat, if MODEL has a template]",
)
@click.option("--max-new-tokens", default=defaults.MAX_NEW_TOKENS, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=defaults.TEMPERATURE, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--seed", default=defaults.SEED, show_default=True, help="The same for every steering.")
def generate(
    prompt: str,
    chosen: ModelOptions,
    profile: str,
    steers: tuple[str, ...],
    chat: bool | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Continue PROMPT without steering and with each --steer. A chat model answers it.

    \b
    confsteer generate "It was a dark and" -p confsteer-demo -s entropy=-0.15 -s entropy=0.3
    confsteer generate "What is the capital of France?" OWNER/CHAT-MODEL -p my-profile -s entropy=0.3
    confsteer generate "The capital of France is" OWNER/CHAT-MODEL -p my-profile --no-chat
    """
    from confsteer.runtimes.generations import generations
    from confsteer.steering import Steering
    from confsteer.text.windows import prompt_ids

    steerings = [Steering(), *map(Steering.parse, steers)]
    model, tokenizer = chosen.load()
    loaded = confsteer.Profile.load(profile)
    found = generations(
        model,
        tokenizer,
        loaded,
        prompt_ids(prompt, tokenizer, chat=chat),
        steerings,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    table = Table("steering", "continuation", "entropy", show_lines=True)
    for one in found:
        table.add_row(tables.escape(str(one.steering)), tables.escape(_shown(one)), f"{one.entropy:.2f}")
    tables.console().print(table, "Entropy: mean over the generated tokens, in nats.", sep="\n")
    tables.print_dial_effects(tables.console(), tables.steered_dials(loaded, steerings))
    if tokenizer.chat_template and chat is None:
        tables.console().print("PROMPT went through the chat template; --no-chat continues it as it stands.")


def _shown(one: Generation) -> str:
    """Make an empty continuation visible."""
    if one.text:
        return one.text.strip() or repr(one.text)
    return "(ended at once)" if one.n_tokens == 1 else f"({one.n_tokens} control tokens)"


@click.command(short_help="Save a checkpoint with a steering in its weights, for any engine.")
@model_options
@profile_option
@steer_option
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Of the checkpoint; new, or empty. Or NEW.gguf.",
)
def bake(chosen: ModelOptions, profile: str, steers: tuple[str, ...], out: Path) -> None:
    """Fold a steering into MODEL's weights and save a checkpoint that any engine runs without confsteer.

    \b
    confsteer bake OWNER/MODEL -p my-profile -s entropy=0.2 --out my-model
    confsteer bake model.gguf -p my-profile -s entropy=0.2 --out calm.gguf

    Ranges (clamp.N=LOW:HIGH) and other positions than all are not linear, so they cannot be baked. Most steerings add a
    constant, which needs a bias in the last MLP. GPT-2, OPT, Pythia, Phi and others have one. Llama, Granite and SmolLM3 are
    given one. In GGUF files, llama.cpp reads a bias for GPT-2, Llama (which includes Mistral, SmolLM2 and others) and
    StarCoder 2.
    """
    from confsteer.steering import Steering

    if len(steers) != 1:
        raise click.UsageError('a checkpoint has one steering: give --steer once, such as "entropy=0.1 scale.767=0"')
    steering, found = Steering.parse(steers[0]), confsteer.Profile.load(profile)
    (_bake_gguf if out.suffix.lower() == ".gguf" else _bake_checkpoint)(chosen, found, steering, out)


def _bake_checkpoint(chosen: ModelOptions, found: Profile, steering: Steering, out: Path) -> None:
    from confsteer.runtimes import baking

    with baking.new_folder(out) as folder:
        loaded = chosen.load()
        baked = baking.bake(loaded.model, found, steering)
        baking.save(loaded, baked, found, folder)
    neurons = f"{len(baked.neurons)} neuron{'s' if len(baked.neurons) > 1 else ''} of layer {found.model.layer}"
    where = " and ".join(filter(None, [baked.weight, baked.bias]))
    click.echo(f"Baked {steering} into {neurons} of {one_safe_line(found.model.id)}: {where}.")
    if baked.mlp_bias_added:
        click.echo("The model's MLPs had no biases; now they have (mlp_bias in its config), zero but for this one.")
    _say_whether_the_profile_fits(baked.weight)
    click.echo(f"Saved: {out}. To run it:")
    click.echo(f"  vllm serve {out}")
    click.echo(f'  AutoModelForCausalLM.from_pretrained("{out}")')


def _bake_gguf(chosen: ModelOptions, found: Profile, steering: Steering, out: Path) -> None:
    from confsteer.model.checkpoint import read_last_layer
    from confsteer.model.loading import source_of
    from confsteer.runtimes.llamacpp.baking import bake_file

    if chosen.device or chosen.dtype != "auto":
        raise click.UsageError("--device and --dtype are for checkpoints: a GGUF file is copied, not loaded")
    source = source_of(chosen.model, chosen.gguf_file)
    last = read_last_layer(source, gguf_file=chosen.gguf_file, revision=chosen.revision)
    if last.file is None:
        raise click.UsageError(
            f"--out {out}: only a GGUF file can be baked into one, and {source} is a checkpoint; give a folder"
        )
    baked = bake_file(steering, found, last, out)
    where = " and ".join(filter(None, [baked.weight, baked.bias]))
    click.echo(f"Baked {steering} into a copy of {last.file.name}: {where}. All else is byte for byte what it was.")
    if baked.was_quantised:
        click.echo(f"{baked.weight} was quantised; it is in float32 now, so that no other weight of it changes.")
    _say_whether_the_profile_fits(baked.weight)
    click.echo(f"Saved: {out}. To run it:")
    click.echo(f"  llama-server -m {shlex.quote(str(out))}")


def _say_whether_the_profile_fits(weight: str | None) -> None:
    if weight:
        click.echo("The profile does not fit these weights: calibrate them to steer further.")
    else:
        click.echo("Nothing but a bias changed, so the profile still fits: what it steers is added to what is baked.")


@click.command(
    context_settings={"ignore_unknown_options": True}, short_help="Start a vLLM server whose requests choose their steering."
)
@click.argument("model", required=False, metavar="[MODEL]")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM OPTION]...")
@click.option("--profile", required=True, type=PROFILE, help="Folder, shipped name or hub repository.")
@click.option("--default", type=STEERING, help='Of requests that ask for none, such as "entropy=0.2".')
def serve(model: str | None, options: tuple[str, ...], profile: str, default: str | None) -> None:
    """Serve MODEL with vLLM. Each request may carry a steering. Options that are not listed below go to vLLM.

    \b
    confsteer serve --profile confsteer-demo --max-model-len 512
    confsteer serve OWNER/MODEL --profile my-profile --port 8001 --tensor-parallel-size 2
    confsteer serve OWNER/MODEL --profile my-profile --default "entropy=0.2"

    \b
    Ask:  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "confsteer-demo",
            "prompt": "It was", "vllm_xargs": {"confsteer": "entropy=0.3"}}'
    See:  curl localhost:8000/confsteer
    """
    from confsteer.runtimes.vllm.front import command

    words = [*filter(None, [model]), *options]
    named = bool(words) and not words[0].startswith("-")
    command.serve(command.server_command(words[0] if named else None, profile, default, words[1:] if named else words))
