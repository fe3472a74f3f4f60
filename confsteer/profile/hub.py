"""A profile on a model hub: upload, and its card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from confsteer.errors import ProfileError
from confsteer.profile.dials import example_effects
from confsteer.profile.profile import Profile
from confsteer.profile.schema import Neuron
from confsteer.steering import DIALS, MADE_BY_HAND


def push(profile: Profile, repo: str, *, private: bool = False) -> str:
    """Upload a profile with a card to a hub repository, which is made if it does not exist. Return its address.

    Raises:
        ProfileError: the hub refused.
        NoNeuronsError: see `card`.
    """
    readme = card(profile, repo)
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="confsteer-push-") as folder:
            profile.save(folder)
            (Path(folder) / "README.md").write_text(readme, encoding="utf-8")
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="confsteer profile", delete_patterns="columns-*")
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ProfileError(f"cannot push to {repo}: {error}") from error
    return str(url)


def card(profile: Profile, repo: str) -> str:
    """Write the repository's README from the profile.

    Raises:
        NoNeuronsError: the profile is of the weights alone, and nobody could steer with it.
    """
    model, corpus = profile.model, profile.corpus
    if corpus is None:
        raise profile.no_neurons(*DIALS)
    # Write metadata for the hub, then the purpose of the profile.
    lines = [
        "---",
        "library_name: confsteer",
        f"base_model: {json.dumps(_text(model.id))}",
        "tags: [confsteer, calibration, interpretability]",
        "---",
        "",
        f"# confsteer profile of `{_text(model.id)}`",
        "",
        f"Entropy and token-frequency neurons of layer {model.layer} ({model.n_neurons:,} neurons), found on "
        f"{corpus.kept_tokens:,} tokens of `{_text(corpus.source)}`.",
        "",
        "```python",
        "import confsteer",
        "",
        f"with confsteer.steer(model, {repo!r}, entropy=+0.2):",
        "    model.generate(**inputs)",
        "```",
        "",
    ]
    # Write a table of neurons for each dial.
    for dial in DIALS:
        neurons = profile.neurons(dial)
        kind = DIALS[dial].neurons.capitalize()
        reach = "{:+.2f} to {:+.2f} nats".format(*profile.reach(dial)) if dial in profile.response else "none: no clear sign"
        effects = example_effects(profile, dial) if dial in profile.response else []
        known = [f"- {dial} {effect.asked:+.3f}: {effect}" for effect in effects if str(effect)]
        if profile.turns_direction(dial):
            assert profile.null_direction is not None
            lines += [f"## {MADE_BY_HAND.capitalize()} ({dial} dial: {reach})", "", str(profile.null_direction), ""]
            lines += [*known, ""] if known else []
            reach, known = "not these", []
        if not neurons:
            lines += [f"{kind} neurons: none found.", ""]
            continue
        lines += [
            f"## {kind} neurons ({dial} dial: {reach})",
            "",
            *([*known, ""] if known else []),
            "| neuron | sign | null fraction | share through norm | mediation | Δentropy when ablated | cosine with unigram |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {n.layer}.{n.key} | {f'{n.sign:+d}' if n.sign else 'none'} | {n.null_fraction:.3f} | {_share(n)} "
            f"| {n.mediation.value:.2f} | {n.entropy_effect_abs.value:.4f} | {n.frequency_cosine:+.2f} |"
            for n in neurons
        ]
        lines.append("")
    return "\n".join(lines)


def _share(neuron: Neuron) -> str:
    return "?" if neuron.norm_share is None else f"{neuron.norm_share.value:.2f}"


def _text(value: str) -> str:
    """Write a profile's string on one line without markup, because a profile may come from anyone."""
    return "".join(c for c in value if c.isalnum() or c in " ._-/+,:()")[:200]
