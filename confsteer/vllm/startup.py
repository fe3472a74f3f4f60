"""The front process: when an engine is configured with a profile, check everything that can be known before weights load."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from confsteer.checkpoint import read_last_layer
from confsteer.errors import ConfsteerError, ProfileMismatchError
from confsteer.profile import Profile
from confsteer.vllm.admission import Admission, admission_of, install
from confsteer.vllm.release import WORKERS, check_features
from confsteer.vllm.settings import KEY, Settings

logger = logging.getLogger("vllm.confsteer")
"""Below vLLM's own, so that its handlers and levels apply."""


def prepare(config: Any) -> None:
    """Make the engine that `config` (a ``VllmConfig``) describes one that steers.

    Raises:
        ConfsteerError: it cannot be, with the reason.
    """
    settings = Settings.of(config.additional_config)
    if settings is None or settings.checksum is not None:
        return  # not ours, or a copy of a configuration that is prepared
    check_features(config)
    profile = settings.load_profile()
    check_model(profile, config.model_config)
    settings = Settings(
        profile=settings.profile,
        default=Admission(profile, settings.default).default or "",
        checksum=profile.checksum,
        version=importlib.metadata.version("confsteer"),
        # No step has more requests, so no step needs more rows.
        slots=config.scheduler_config.max_num_seqs,
    )
    # vLLM hashes this dictionary into the name of its compile cache.
    config.additional_config = {**config.additional_config, KEY: settings.model_dump()}
    parallel = config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    install(settings)
    admission_of(settings).weights_fit = True  # whatever became of an engine before it in this process


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
