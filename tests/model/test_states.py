from __future__ import annotations

import pytest
import torch

from confsteer.distributed import SINGLE_PROCESS, Process
from confsteer.last_layer.states import TokenStates
from confsteer.model.dissect import dissect
from confsteer.model.states import BATCH_SIZE, Recording, _forward, in_groups, join_batches, record_continuations
from confsteer.text.windows import make_windows
from tests.models import FAMILIES, VOCAB, TinyFamily, tiny_model
from tests.planted import planted


def recording(model_type: str = "gemma2", process: Process | None = None) -> Recording:
    model, tokenizer, texts, _ = planted(model_type)
    windows = make_windows(texts, tokenizer, window=64)
    return Recording(model, dissect(model), windows, torch.device("cpu"), process or SINGLE_PROCESS)


def same(one: list[TokenStates], other: list[TokenStates]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
        if a is not None and b is not None
    )


def test_later_passes_repeat_the_first_whatever_was_kept() -> None:
    kept = recording()
    first = list(kept.read())
    assert len(first) > 3
    assert first[0].mlp_output is not None
    assert same(list(kept.read()), first)
    size = sum(field.nbytes for field in first[0] if field is not None)
    for room in (0, size, 2 * size + 1):
        limited = recording()
        limited._room = room
        for _ in range(3):
            assert same(list(limited.read()), first)
        assert len(limited._kept) == room // size


def test_a_pass_that_is_abandoned_leaves_the_next_one_whole() -> None:
    whole = list(recording().read())
    interrupted = recording()
    next(iter(interrupted.read()))
    assert same(list(interrupted.read()), whole)


def test_shares_are_the_whole() -> None:
    whole = list(recording().read())
    shares = [list(recording(process=Process(rank, 3)).read()) for rank in range(3)]
    assert same([shares[i % 3][i // 3] for i in range(len(whole))], whole)


def test_reading_is_reported() -> None:
    seen: list[int] = []
    one = recording()
    for _ in range(2):
        seen.clear()
        list(one.read(seen.append))
        assert sum(seen) == one.windows.n_tokens


def test_larger_batches_have_the_same_tokens_and_whole_windows() -> None:
    batches = list(recording().read())
    tokens = len(batches[0].targets)
    groups = [join_batches(group) for group in in_groups(iter(batches), 2 * tokens)]
    assert all(len(group.targets) >= 2 * tokens for group in groups[:-1])
    joined = torch.cat([group.residual for group in groups])
    assert torch.equal(joined, torch.cat([batch.residual for batch in batches]))
    assert int(groups[0].window.max()) + 1 == 2 * BATCH_SIZE
    sizes = torch.cat([group.window.unique(return_counts=True)[1] for group in groups])
    assert torch.equal(sizes, torch.cat([batch.window.unique(return_counts=True)[1] for batch in batches]))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_continuations_of_a_shared_context_leave_what_whole_passes_leave(family: TinyFamily) -> None:
    model = tiny_model(family.model_type, family.config)
    anatomy = dissect(model)
    contexts = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1)).tolist()
    continuations = torch.randint(1, VOCAB, (5, 6), generator=torch.Generator().manual_seed(2)).tolist()
    # Those of a context need not follow each other; the longest is beyond the sliding windows.
    sequences = [
        (contexts[0], continuations[0]),
        (contexts[1][:3], continuations[1][:1]),
        (contexts[0], continuations[2][:1]),
        (contexts[0], continuations[3][:4]),
        (contexts[1], continuations[4][:1]),
    ]
    neurons = torch.tensor([3, 7])
    seen: list[int] = []
    ours = record_continuations(model, anatomy, sequences, neurons, torch.device("cpu"), seen.append)
    assert seen == [3, 1, 1]
    for i, (context, continuation) in enumerate(sequences):
        ids, mine = torch.tensor([[*context, *continuation]]), ours.window == i
        states, _ = _forward(model, anatomy, ids, torch.ones_like(ids), use_cache=False)
        theirs = slice(len(context) - 1, -1)
        assert ours.targets[mine].tolist() == continuation
        torch.testing.assert_close(ours.residual[mine], states.residual[theirs], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.activations[mine], states.activations[theirs][:, neurons], atol=1e-4, rtol=1e-4)
        assert (ours.mlp_output is None) == (states.mlp_output is None)
        if ours.mlp_output is not None and states.mlp_output is not None:
            torch.testing.assert_close(ours.mlp_output[mine], states.mlp_output[theirs], atol=1e-4, rtol=1e-4)
