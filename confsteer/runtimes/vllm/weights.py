"""The check that a model for vLLM has the profile's weights, as far as its checkpoint tells."""

from __future__ import annotations

import logging
from typing import Any

from confsteer.errors import ConfsteerError, ProfileMismatchError
from confsteer.model.checkpoint import read_last_layer
from confsteer.profile.profile import Profile

logger = logging.getLogger("vllm.confsteer")
"""Logger below vLLM's own, so that its handlers and levels apply."""

OTHER_WEIGHTS = (
    "weights were loaded while the server ran, and they are not those of its profile: it no longer steers. Load the former "
    "weights, or restart it with a profile of these"
)


def check_model(profile: Profile, model: Any) -> None:
    """
    Args:
        profile: to steer with.
        model: the engine's ``ModelConfig``.

    Raises:
        ProfileMismatchError: the profile is of another model, by the sizes in its config or by its weights on disk.
    """
    text = model.hf_text_config
    expected = {"num_hidden_layers": profile.model.layer + 1, "hidden_size": profile.model.d_model}
    for name, value in expected.items():
        if (actual := getattr(text, name, value)) != value:
            raise ProfileMismatchError(f"the profile is of {profile.model.id} with {name} {value}; {model.model} has {actual}")
    try:
        last = read_last_layer(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except ConfsteerError as error:
        logger.info("confsteer: the checkpoint's fingerprint was not compared (%s); the loaded weights will be.", error)
        return
    profile.check_model(last.anatomy)
