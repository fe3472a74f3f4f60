"""The edits at each place, against plain loops: they need no vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from confsteer.runtimes.vllm.worker.edits import ACTIVATIONS, DirectionEdit, OutputEdit, RoutedEdit, Rows
from confsteer.runtimes.vllm.worker.table import SteeringTable

D, UNITS, EXPERTS, SLOTS, TOKENS = 16, 6, 4, 2, 9
NEURONS = [(1, 5), (3, 0), (1, 2)]
"""Expert and number of each."""
FIRST = 2
"""Their first column in the table, behind the neurons of another place."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mixture:
    """Experts as their formula has them, one token and one expert at a time."""

    def __init__(self, *, biased: bool = False) -> None:
        self.gate, self.up, self.down = (random(EXPERTS, UNITS, D, seed=seed) for seed in range(3))
        self.gate_bias, self.up_bias = (random(EXPERTS, UNITS, seed=seed) * biased for seed in (3, 4))
        self.inputs, logits = random(TOKENS, D, seed=5), random(TOKENS, EXPERTS, seed=6)
        self.weights, self.chosen = logits.softmax(dim=1).topk(SLOTS, dim=1)

    def rows(self) -> Rows:
        expert, unit = torch.tensor(NEURONS).T
        return Rows(*(t[expert, unit] for t in (self.gate, self.up, self.gate_bias, self.up_bias, self.down)))

    def output(self, edits: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Output of all experts ``[tokens, d_model]``, with edits ``[4, tokens, neurons]`` of what multiplies each write."""
        output = torch.zeros(TOKENS, D)
        for token in range(TOKENS):
            for expert, weight in zip(self.chosen[token].tolist(), self.weights[token].tolist(), strict=True):
                gate = self.gate[expert] @ self.inputs[token] + self.gate_bias[expert]
                activations = weight * scale * silu(gate) * (self.up[expert] @ self.inputs[token] + self.up_bias[expert])
                for column, (of_expert, unit) in enumerate(NEURONS):
                    if edits is not None and of_expert == expert:
                        gain, bias, low, high = edits[:, token, column]
                        activations[unit] = (activations[unit] * gain + bias).clamp(low, high)
                output[token] += activations @ self.down[expert]
        return output


def steerings() -> Tensor:
    """Edits of two rows of the table, ``[4, 2, columns]``."""
    shape = (2, FIRST + len(NEURONS))
    return torch.stack([random(*shape, seed=7), random(*shape, seed=8), torch.full(shape, -0.7), torch.full(shape, 0.9)])


def table(rows: list[int]) -> SteeringTable:
    made = SteeringTable(FIRST + len(NEURONS), slots=2, max_tokens=TOKENS + 3, device=torch.device("cpu"))
    made.write([1, 2], steerings())
    made.point(torch.tensor(rows))
    return made


ROWS = [0, 1, 2, 1, 0, 2, 2, 1, 1]


def routed(mixture: Mixture, rows: list[int], scale: float) -> RoutedEdit:
    experts = torch.tensor([expert for expert, _ in NEURONS])
    return RoutedEdit(table(rows), FIRST, mixture.rows(), "silu", experts=experts, output_scale=scale)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_routed_neurons_are_edited_where_they_are_active(biased: bool, scale: float) -> None:
    """With a factor on the experts' output that comes later, too."""
    mixture = Mixture(biased=biased)
    neutral = torch.tensor([1.0, 0.0, -torch.inf, torch.inf])[:, None, None].expand(4, 1, len(NEURONS))
    by_token = torch.cat([neutral, steerings()[..., FIRST:]], dim=1)[:, ROWS]
    change = routed(mixture, ROWS, scale)(mixture.inputs, mixture.weights, mixture.chosen)
    expected = mixture.output(by_token, scale=scale)
    torch.testing.assert_close((mixture.output() + change) * scale, expected, atol=1e-5, rtol=1e-5)
    assert float((expected - scale * mixture.output()).norm()) > 1


def test_a_neutral_row_adds_nothing_at_all() -> None:
    mixture = Mixture()
    assert not routed(mixture, [0] * TOKENS, 1.5)(mixture.inputs, mixture.weights, mixture.chosen).any()


def test_for_the_proof_a_push_is_written_on_every_token() -> None:
    mixture = Mixture()
    edit = routed(mixture, [1] * TOKENS, 2.0)
    push = torch.tensor([0.0] * FIRST + [3.0, -2.0, 1.0])
    free = torch.full_like(push, torch.inf)
    edit.table.write([1], torch.stack([torch.ones_like(push), push, -free, free])[:, None])
    edit.everywhere.fill_(True)
    change = 2.0 * edit(mixture.inputs, mixture.weights, mixture.chosen)
    torch.testing.assert_close(change, (push[FIRST:] @ mixture.rows().writes).expand(TOKENS, D), atol=1e-4, rtol=1e-4)
    edit.everywhere.fill_(False)
    asleep = (mixture.chosen[:, :, None] != edit.experts).all(dim=1).all(dim=1)
    assert asleep.any()
    assert not edit(mixture.inputs, mixture.weights, mixture.chosen)[asleep].any()


def test_a_gate_is_a_routing_weight_of_every_token() -> None:
    mixture = Mixture()
    rows, gate = mixture.rows(), random(TOKENS, 1, seed=9).sigmoid()
    edit = OutputEdit(table(ROWS), FIRST, rows, "silu")
    before = gate * silu(mixture.inputs @ rows.gate.T) * (mixture.inputs @ rows.up.T)
    after = before.clone()
    for token, row in enumerate(ROWS):
        if row:
            gain, bias, low, high = steerings()[:, row - 1, FIRST:]
            after[token] = (before[token] * gain + bias).clamp(low, high)
    change = edit.change(mixture.inputs, gate, None)
    torch.testing.assert_close(change, (after - before) @ rows.writes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (1,)])
def test_the_constant_of_each_token_is_that_of_its_row(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    edit = DirectionEdit(table(ROWS), 1, random(D))
    free = torch.full((2, 1), torch.inf)
    lengths = torch.tensor([0.0, 3.0, -2.0])
    constants = torch.stack([torch.ones(2, 1), lengths[1:, None], -free, free])
    edit.table.write([1, 2], constants.expand(4, 2, FIRST + len(NEURONS)))
    hidden_states = random(*batch, TOKENS, D, seed=2).to(dtype)
    expected = (hidden_states.float() + lengths[ROWS][:, None] * random(D)).to(dtype)
    assert torch.equal(edit(hidden_states), expected)
    assert torch.equal(edit(hidden_states)[..., 0, :], hidden_states[..., 0, :])


def test_compiled_code_follows_what_the_buffers_hold() -> None:
    mixture = Mixture()
    edit = routed(mixture, ROWS, 1.0)
    compiled: Any = torch.compile(edit, backend="eager", dynamic=True, fullgraph=True)
    for tokens in (TOKENS, TOKENS - 2):
        edit.table.point(torch.tensor(ROWS[::-1]))
        given = mixture.inputs[:tokens], mixture.weights[:tokens], mixture.chosen[:tokens].int()
        assert torch.equal(compiled(*given), edit(*given))
        edit.everywhere.fill_(True)
        assert torch.equal(compiled(*given), edit(*given))
        edit.everywhere.fill_(False)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions_are_those_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    gate, up = 4 * random(50), 4 * random(50, seed=1)
    if name == "swigluoai":
        gated = gate.clamp(max=7)
        expected = (up.clamp(-7, 7) + 1) * gated * torch.sigmoid(1.702 * gated)
    else:
        expected = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)](gate) * up
    torch.testing.assert_close(ACTIVATIONS[name](gate, up), expected)
