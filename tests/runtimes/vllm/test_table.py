from __future__ import annotations

import pytest
import torch

from confsteer.runtimes.vllm.worker.edits import ProjectionEdit
from confsteer.runtimes.vllm.worker.table import SteeringTable

NEURONS = [5, 2, 30]


def projection() -> ProjectionEdit:
    """A projection's edit with a table of two rows besides the neutral one."""
    table = SteeringTable(len(NEURONS), slots=2, max_tokens=8, device=torch.device("cpu"))
    return ProjectionEdit(table, 0, torch.tensor(NEURONS))


def edits() -> torch.Tensor:
    """``[4, 2, 3]``: gain, bias, low and high."""
    torch.manual_seed(0)
    gain, bias = torch.randn(2, 3), torch.randn(2, 3)
    return torch.stack([gain, bias, torch.full((2, 3), -0.5), torch.full((2, 3), 0.5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neutral_rows_are_bit_identical(dtype: torch.dtype) -> None:
    activations = torch.randn(6, 32).to(dtype)
    assert torch.equal(projection()(activations), activations)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_each_token_follows_its_row(batch: tuple[int, ...]) -> None:
    steered, rows = projection(), [2, 0, 1, 1, 2]
    steered.table.write([2, 1], edits())
    steered.table.point(torch.tensor(rows))
    activations = torch.randn(*batch, 5, 32)
    seen = steered(activations).reshape(5, 32)
    expected = activations.reshape(5, 32).clone()
    for token, row in enumerate(rows):
        for k, neuron in enumerate(NEURONS):
            if row:
                gain, bias, low, high = edits()[:, {2: 0, 1: 1}[row], k]
                expected[token, neuron] = min(max(expected[token, neuron] * gain + bias, low), high)
    assert torch.equal(seen, expected)


def test_clearing_reaches_the_rows_of_longer_steps_before() -> None:
    steered = projection()
    steered.table.write([1], edits()[:, :1])
    steered.table.point(torch.ones(8, dtype=torch.int64))
    steered.table.point(torch.zeros(2, dtype=torch.int64))
    activations = torch.randn(8, 32)
    assert not torch.equal(steered(activations), activations)
    steered.table.clear()
    assert torch.equal(steered(activations), activations)


def test_it_is_part_of_the_model_but_not_of_its_weights() -> None:
    model = torch.nn.Sequential(projection())
    assert model.state_dict() == {}
    assert {name for name, _ in model.named_buffers()} == {"0.units", "0.table.edits", "0.table.rows"}


def test_compiled_code_follows_what_the_buffers_hold() -> None:
    steered = projection()
    compiled = torch.compile(steered, backend="eager", dynamic=True)
    for seed in range(3):
        torch.manual_seed(seed)
        steered.table.write([1, 2], torch.randn(4, 2, 3).sort(dim=0).values)
        steered.table.point(torch.randint(0, 3, (6,)))
        activations = torch.randn(6 - seed, 32)
        assert torch.equal(compiled(activations), steered(activations))
