"""Neurons that others have published, and their agreement with a scan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from confsteer.discovery.select import candidates
from confsteer.errors import SettingError
from confsteer.profile.profile import Profile

FILE = Path(__file__).with_name("published.json")
Kind = Literal["entropy", "null fraction", "logit variance", "token frequency"]
"""Kind of a list: entropy or token-frequency neurons, or those with the largest null fractions or smallest logit variances."""


class PublishedList(BaseModel):
    """Neurons of one publication."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    kind: Kind
    neurons: tuple[int, ...]
    """The neurons. Empty if the publication says that there are none."""
    null_fraction: dict[int, float] = {}
    """Null fractions by neuron, if the publication gives them."""
    null_dims: int | None = None
    """Number of directions in the null space of these null fractions."""
    note: str | None = None


class PublishedModel(BaseModel):
    """Everything published about the last layer of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """Hub id."""
    layer: int
    lists: tuple[PublishedList, ...]


class Agreement(NamedTuple):
    """Agreement of one published list with the candidates of a scan."""

    published: PublishedList
    found: tuple[int, ...]
    """Neurons of the list that are candidates."""
    by_chance: float
    """Expected number if as many candidates were drawn at random."""


def published_models() -> dict[str, PublishedModel]:
    """Read the published lists, by hub id, with their sources written out."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: PublishedModel(
            id=name,
            layer=model["layer"],
            lists=tuple(PublishedList(**one | {"source": content["sources"][one["source"]]}) for one in model["lists"]),
        )
        for name, model in content["models"].items()
    }


def published(name: str) -> PublishedModel:
    """Find the published lists of a model, by its hub id or the part after the owner. Upper and lower case are alike.

    Raises:
        SettingError: nothing is published about it.
    """
    known = published_models()
    for one, model in known.items():
        if name.lower() in (one.lower(), one.lower().partition("/")[2]):
            return model
    raise SettingError(
        f"no neurons of {name} are in the list of published ones. It has {', '.join(known)}. To compare a model that is made "
        "of one of these, name that one: --published NAME"
    )


def agreement(profile: Profile, model: PublishedModel) -> list[Agreement]:
    """Compare the candidates of a scan with the published lists. Lists of token-frequency neurons are left out.

    Raises:
        SettingError: the profile's last layer is another one than the published, or smaller.
    """
    largest = max((i for one in model.lists for i in one.neurons), default=0)
    if profile.model.layer != model.layer or largest >= profile.model.n_neurons:
        raise SettingError(
            f"neurons of {model.id} are published for layer {model.layer}, with numbers up to {largest:,}. The last layer of "
            f"{profile.model.id} is {profile.model.layer}, of {profile.model.n_neurons:,} neurons: it is not made of that model"
        )
    found = set(candidates(profile.weights))
    chance = len(found) / profile.model.n_neurons
    return [
        Agreement(one, tuple(i for i in one.neurons if i in found), chance * len(one.neurons))
        for one in model.lists
        if one.kind != "token frequency"
    ]
