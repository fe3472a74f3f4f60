"""The model ``confsteer`` for lm-eval (EleutherAI's lm-evaluation-harness): its own ``hf`` model, steered.

lm-eval 0.4 does not look for models outside itself. So this module must be imported before ``--model confsteer`` is used.
``confsteer lm-eval`` does so. In Python:

    import confsteer.evaluation.lm_eval_model
    lm_eval.simple_evaluate("confsteer", {"pretrained": ..., "profile": ..., "steering": "entropy=0.3"}, tasks=[...])

vLLM does not need this module: lm-eval's ``vllm`` model passes on ``additional_config``, and confsteer's plugin reads that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.__main__
import lm_eval.evaluator
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from confsteer.errors import LoadError, SteeringError
from confsteer.evaluation.lm_eval_samples import TaskCalibration, calibrations
from confsteer.files import write_result
from confsteer.model import gguf
from confsteer.model.loading import DEMO, DEMO_NAME, load_model
from confsteer.profile.profile import Profile
from confsteer.runtimes.transformers import Request, steer
from confsteer.steering import Steering

NOT_OF_GGUF = {
    *("subfolder", "tokenizer", "trust_remote_code", "use_fast_tokenizer", "peft", "delta", "autogptq", "gptqmodel"),
    *("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan"),
}
"""Settings of lm-eval's ``hf`` model for loading a model. It would ignore them for a model that is loaded already."""


@register_model("confsteer")
class SteeredLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's ``hf`` model, steered while it answers requests, and unsteered at any other time.

    Neutral steering gives lm-eval's own numbers, bit for bit.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel = DEMO_NAME,
        *,
        profile: Profile | str | os.PathLike[str] | None = None,
        steering: Request | None = None,
        **settings: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: hub id, folder, ``.gguf`` file, a model, or ``confsteer-demo``, the bundled one. A GGUF file in a hub
                repository or a folder is named by ``gguf_file=FILE``; its weights are dequantised.
            profile: the model's profile, or a source that `Profile.load` takes. None for an unsteered model.
            steering: a request that `Steering.parse` takes. lm-eval splits ``--model_args`` at commas outside brackets, and the
                text form (``entropy=0.3 scale.767=0``) has none.
            **settings: settings of lm-eval's ``hf`` model.

        Raises:
            SteeringError: the steering is malformed, out of reach, or lacks a profile.
            NoNeuronsError: the profile has no neurons to turn.
            ProfileError: there is no such profile, or it is of another model.
            UnsupportedModelError: see `confsteer.model.dissect`.
            LoadError: there is no such model, or a setting does not fit a GGUF file.
        """
        self.steering = Steering.parse({} if steering is None else steering)
        self.profile = Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile
        if self.profile is not None:
            self.steering = self.profile.resolve(self.steering)
            self.profile.edit(self.steering)
        elif self.steering != Steering():
            raise SteeringError(f"steering {self.steering} needs the model's profile: give profile=PROFILE too")
        source, settings = _dequantised(pretrained, settings) if isinstance(pretrained, str) else (pretrained, settings)
        try:
            super().__init__(str(DEMO) if source == DEMO_NAME else source, **settings)
        except OSError as error:
            raise LoadError(f"cannot load {pretrained}: {error}") from error
        # Refuse a profile of another model now, not after the tasks have been loaded.
        with self._steered():
            pass

    def _steered(self) -> contextlib.AbstractContextManager[object]:
        """Open the steering context once for all requests of a kind, because entering checks the whole model."""
        if self.profile is None:
            return contextlib.nullcontext()
        return steer(self.model, self.profile, self.steering, tokenizer=self.tokenizer)

    def _steered_for_scoring(self) -> contextlib.AbstractContextManager[object]:
        if self.steering.positions != "all":
            raise SteeringError(
                f"positions={self.steering.positions} steers what is generated, and this task scores answers that are given: "
                "leave positions out"
            )
        return self._steered()

    def loglikelihood(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        with self._steered_for_scoring():
            return super().loglikelihood(*args, **kwargs)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
        with self._steered_for_scoring():
            return super().loglikelihood_rolling(*args, **kwargs)  # type: ignore[no-any-return]

    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        with self._steered():
            return super().generate_until(*args, **kwargs)  # type: ignore[no-any-return]


def _dequantised(pretrained: str, settings: dict[str, Any]) -> tuple[str | PreTrainedModel, dict[str, Any]]:
    """Load a model from a GGUF file. Any other model is left to lm-eval.

    Returns:
        The model, and lm-eval's settings for it.

    Raises:
        LoadError: it cannot be loaded, or not with these settings.
    """
    name, revision = settings.get("gguf_file"), settings.get("revision")
    if gguf.find(pretrained, name, revision) is None:
        return pretrained, settings
    if wrong := sorted(key for key in NOT_OF_GGUF & set(settings) if settings[key]):
        raise LoadError(f"{wrong[0]}={settings[wrong[0]]} is no way to load a GGUF file: leave it out")
    dtype = str(settings.get("dtype") or "auto").removeprefix("torch.")
    loaded = load_model(pretrained, gguf_file=name, device=settings.get("device"), dtype=dtype, revision=revision)
    rest = {
        key: value for key, value in settings.items() if key not in (*NOT_OF_GGUF, "gguf_file", "revision", "device", "dtype")
    }
    return loaded.model, rest | {"tokenizer": loaded.tokenizer}


def run(options: Sequence[str]) -> tuple[list[TaskCalibration], Path | None]:
    """Run lm-eval's command line with ``--model confsteer``, and measure the calibration of its multiple-choice answers.

    Args:
        options: options of lm-eval. Another ``--model`` among them replaces ours.

    Returns:
        A row per multiple-choice task, and the file with the rows beside lm-eval's results, if lm-eval was asked to write. Only
        the first of several processes has rows.
    """
    rows: list[TaskCalibration] = []
    trackers: list[Any] = []
    simple_evaluate = lm_eval.evaluator.simple_evaluate

    def evaluate(*args: Any, log_samples: bool, evaluation_tracker: Any, **kwargs: Any) -> Any:
        """Log samples, which are needed here. lm-eval writes them to files only if asked."""
        results = simple_evaluate(*args, log_samples=True, evaluation_tracker=evaluation_tracker, **kwargs)
        if results is not None:
            rows.extend(calibrations(results))
            trackers.append(evaluation_tracker)
            if not log_samples:
                del results["samples"]
        return results

    # Put "run" first: it is lm-eval's own name of this command.
    words = options[1:] if options and options[0] == "run" else options
    # Replace functions: neither lm-eval's command line nor its results' writer returns the results.
    with (
        _replaced(lm_eval.evaluator, "simple_evaluate", evaluate),
        _replaced(sys, "argv", ["lm-eval", "--model", "confsteer", *words]),
    ):
        lm_eval.__main__.cli_evaluate()
    file = _beside_results(trackers[0]) if rows and trackers[0].output_path else None
    if file is not None:
        write_result(file, (json.dumps({row.task: row._asdict() for row in rows}, indent=1) + "\n").encode())
    return rows, file


def _beside_results(tracker: Any) -> Path:
    """Name a file in the folder where lm-eval writes: a folder per model, or that of the named file."""
    path = Path(tracker.output_path)
    folder = path.parent if path.suffix == ".json" else path / tracker.general_config_tracker.model_name_sanitized
    return folder / f"calibration_{tracker.date_id}.json"


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
