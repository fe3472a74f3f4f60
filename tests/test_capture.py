from __future__ import annotations

import torch

from confsteer.anatomy import dissect
from confsteer.capture import BATCH_SIZE, Recording, regroup
from confsteer.corpus import make_windows
from confsteer.discovery.readout import TokenStates
from confsteer.parallel import ALONE, Share
from tests.planted import planted


def recording(model_type: str = "gemma2", share: Share | None = None) -> Recording:
    model, tokenizer, texts, _ = planted(model_type)
    windows = make_windows(texts, tokenizer, window=64)
    return Recording(model, dissect(model), windows, torch.device("cpu"), share or ALONE)


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
    shares = [list(recording(share=Share(rank, 3)).read()) for rank in range(3)]
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
    groups = list(regroup(iter(batches), 2 * tokens))
    assert all(len(group.targets) >= 2 * tokens for group in groups[:-1])
    joined = torch.cat([group.residual for group in groups])
    assert torch.equal(joined, torch.cat([batch.residual for batch in batches]))
    assert int(groups[0].window.max()) + 1 == 2 * BATCH_SIZE
    sizes = torch.cat([group.window.unique(return_counts=True)[1] for group in groups])
    assert torch.equal(sizes, torch.cat([batch.window.unique(return_counts=True)[1] for batch in batches]))
