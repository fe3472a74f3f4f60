"""Inference-time confidence control for language models, with their own entropy and token-frequency neurons."""

from confsteer.calibration import calibrate
from confsteer.checkpoint import Scan, scan
from confsteer.errors import (
    ConfsteerError,
    CorpusError,
    NoNeuronsError,
    ProfileCorruptError,
    ProfileError,
    ProfileMismatchError,
    ProfileNotFoundError,
    ProfileVersionError,
    SettingError,
    SteeringError,
    UnsupportedModelError,
)
from confsteer.hf import steer
from confsteer.profile import Neuron, Profile, Response
from confsteer.steering import Steering

__all__ = [
    "ConfsteerError",
    "CorpusError",
    "Neuron",
    "NoNeuronsError",
    "Profile",
    "ProfileCorruptError",
    "ProfileError",
    "ProfileMismatchError",
    "ProfileNotFoundError",
    "ProfileVersionError",
    "Response",
    "Scan",
    "SettingError",
    "Steering",
    "SteeringError",
    "UnsupportedModelError",
    "calibrate",
    "scan",
    "steer",
]
