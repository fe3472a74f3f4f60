"""Start-up in the front process: check everything about an engine with a profile that can be known before weights load."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from typing import Any

import vllm

from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.runtimes.vllm.front import admission, changes, counters, door
from confsteer.runtimes.vllm.front.admission import Admission
from confsteer.runtimes.vllm.out_of_reach import direction_alone, experts_out_of_reach, out_of_reach
from confsteer.runtimes.vllm.release import WORKERS, check_features
from confsteer.runtimes.vllm.settings import Settings
from confsteer.runtimes.vllm.weights import check_model

logger = logging.getLogger("vllm.confsteer")


def prepare(config: Any) -> None:
    """Make the engine of `config` (a ``VllmConfig``) steer.

    Raises:
        ConfsteerError: it cannot steer; the message gives the reason.
    """
    settings = Settings.of(config.additional_config)
    if settings is None or settings.checksum is not None:
        return  # not ours, or a copy of a configuration that is prepared
    check_features(config)
    profile = whole = settings.load_profile()
    check_model(profile, config.model_config)
    if reason := out_of_reach(profile, config, vllm.__version__):
        if profile.null_direction is None:
            raise experts_out_of_reach(profile, reason)
        profile = direction_alone(profile)
        logger.warning("confsteer: no neurons of experts are steered, only the null direction, because %s", reason)
    settings = Settings(
        profile=settings.profile,
        default=Admission(profile, settings.default, config).default or "{}",
        checksum=whole.checksum,
        version=importlib.metadata.version("confsteer"),
        direction_alone=profile is not whole,
        # Take as many rows as a step has requests: no step needs more.
        slots=config.scheduler_config.max_num_seqs,
    )
    # Write the settings back: vLLM hashes this dictionary into the name of its compile cache.
    config.additional_config = {**config.additional_config, CONFIG_KEY: settings.model_dump()}
    parallel = config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    _install()
    admission.admissions.pop(settings, None)  # whatever became of an engine before it in this process


@functools.cache
def _install() -> None:
    """Change this process's engines and servers, if they are configured to steer."""
    for part in (admission, door, changes, counters):
        part.install()
