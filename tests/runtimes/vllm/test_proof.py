"""The proof accepts a model that is steered and refuses every way of not being."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.readout import NormParameters
from confsteer.runtimes.vllm.worker.proof import PUSHES, ProofOutputs, prove, unexplained

TOKENS, D = 4, 48


class Model:
    """A last layer: a residual, an MLP output that neurons write to, a norm on it if `normed`, and the final norm."""

    def __init__(self, *, centred: bool, normed: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.before, self.mlp, self.write = random(TOKENS, D), random(TOKENS, D), 0.05 * random(D)
        self.norm = NormParameters(1 + 0.3 * random(D), 0.2 * random(D) if centred else None, 1e-5, centred)
        self.write_gain = 1 + 0.3 * random(D) if normed else None

    def output(self, push: float | Tensor) -> Tensor:
        """Of the final norm, with the neurons writing ``push · write`` more; per token if it is ``[tokens, 1]``."""
        mlp = self.mlp + push * self.write
        if self.write_gain is not None:
            mlp = mlp / mlp.square().mean(-1, keepdim=True).sqrt() * self.write_gain
        x = self.before + mlp
        x = x - x.mean(-1, keepdim=True) if self.norm.centred else x
        y = x / (x.square().mean(-1, keepdim=True) + self.norm.epsilon).sqrt() * self.norm.gain
        return y if self.norm.bias is None else y + self.norm.bias

    def outputs(self, dtype: torch.dtype = torch.float32, **changed: Any) -> ProofOutputs:
        every_other = (torch.arange(TOKENS) % 2)[:, None]
        seen = ProofOutputs(
            neutral=self.output(0.0),
            again=self.output(0.0),
            pushed=tuple(self.output(push) for push in PUSHES[dtype]),
            mixed=self.output(PUSHES[dtype][-1] * every_other),
            replaced=self.output(2.0),
            clamped=self.output(2.0),
        )._replace(**changed)
        rounded = {name: o.to(dtype).float() for name, o in seen._asdict().items() if isinstance(o, Tensor)}
        return seen._replace(pushed=tuple(o.to(dtype).float() for o in seen.pushed), **rounded)


MODELS = [Model(centred=centred, normed=normed) for centred in (False, True) for normed in (False, True)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_steered_model_passes(model: Model, dtype: torch.dtype) -> None:
    prove(model.outputs(dtype), model.write, model.norm, model.write_gain, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_far_larger_than_ordinary_passes(dtype: torch.dtype) -> None:
    """As a first token has, where one coordinate may be a hundred times the others."""
    model = Model(centred=False, normed=False)
    model.before *= 10
    model.before[:, 3] *= 100
    prove(model.outputs(dtype), model.write, model.norm, None, dtype)


def test_a_rank_that_is_fed_zeros_passes() -> None:
    """The last of a pipeline, in a model without biases."""
    model = Model(centred=False, normed=False)
    model.before, model.mlp = torch.zeros(TOKENS, D), torch.zeros(TOKENS, D)
    assert not model.output(0.0).any()
    prove(model.outputs(), model.write, model.norm, None, torch.float32)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_unexplained_is_rounding_for_the_right_write_and_most_of_a_wrong_one(model: Model) -> None:
    seen = torch.stack([model.output(push) for push in (0.0, *PUSHES[torch.float32])])
    assert unexplained(3 * model.write, seen, model.norm, model.write_gain) < 1e-4
    wrong = torch.randn(D, generator=torch.Generator().manual_seed(1))
    assert unexplained(wrong, seen, model.norm, model.write_gain) > 0.5
    # As if one of twenty neurons were another.
    assert unexplained(model.write + 0.05 * wrong / 20**0.5, seen, model.norm, model.write_gain) > 1e-2


@pytest.mark.filterwarnings("error")
def test_norms_whose_gains_are_parameters_bring_no_warning_to_the_log() -> None:
    model = Model(centred=True, normed=False)
    norm = model.norm._replace(gain=torch.nn.Parameter(model.norm.gain))
    prove(model.outputs(), model.write, norm, None, torch.float32)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whatever_is_wrong_is_said(model: Model, dtype: torch.dtype) -> None:
    largest = PUSHES[dtype][-1]
    neutral, other = model.output(0.0), Model(centred=False, normed=False, seed=1)
    swapped = model.output(largest * ((torch.arange(TOKENS) + 1) % 2)[:, None])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"again": 1.5 * neutral}, "the same input gives different outputs"),
        ({"pushed": (neutral,) * 3}, "pushing the neurons changes nothing"),
        ({"mixed": neutral}, "a token is not steered as its request"),
        ({"mixed": model.output(largest)}, "a token is steered as another request"),
        ({"mixed": swapped}, "a token is not steered as its request"),
        ({"clamped": neutral, "replaced": model.output(8.0)}, "gain and bounds do not agree"),
        ({"neutral": torch.full_like(neutral, torch.nan)}, "the same input gives different outputs"),
    ]
    for changed, sentence in wrong:
        with pytest.raises(UnsupportedModelError, match=sentence):
            prove(model.outputs(dtype, **changed), model.write, model.norm, model.write_gain, dtype)
    with pytest.raises(UnsupportedModelError, match="does not move the residual by their output weights"):
        prove(model.outputs(dtype), other.write, model.norm, model.write_gain, dtype)
