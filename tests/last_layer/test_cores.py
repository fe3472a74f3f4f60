from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from confsteer.last_layer.cores import Scratch, exponential, on_all_cores

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_blocks_are_worked_on_side_by_side_with_a_thread_and_no_gradients_each() -> None:
    both, seen = threading.Barrier(2, timeout=30), {}

    def work(block: int) -> None:
        both.wait()  # passed by two at once, or by none
        seen[block] = (torch.get_num_threads(), torch.is_grad_enabled())

    on_all_cores(work, range(6), CPU)
    assert seen == dict.fromkeys(range(6), (1, False))


def test_fewer_blocks_than_threads_follow_each_other_on_all_of_them() -> None:
    threads = []
    on_all_cores(lambda block: threads.append((threading.current_thread(), torch.get_num_threads())), range(1), CPU)
    assert threads == [(threading.current_thread(), 2)]


@pytest.mark.parametrize("blocks", [1, 7])
def test_an_error_reaches_the_caller_and_the_number_of_threads_is_as_before(blocks: int) -> None:
    def fail(block: int) -> None:
        raise ZeroDivisionError(block)

    with pytest.raises(ZeroDivisionError):
        on_all_cores(fail, range(blocks), CPU)
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [2, 2]


def test_each_thread_gets_its_own_memory_again() -> None:
    scratch, both, seen = Scratch(torch.empty(0, dtype=torch.float64)), threading.Barrier(2, timeout=30), []

    def work(block: int) -> None:
        first = scratch.empty("a", 3, 4).fill_(block)
        both.wait()
        other, again = scratch.empty("b", 12), scratch.empty("a", 6)
        # Compare the places while both threads hold them.
        seen.append((first.data_ptr(), other.data_ptr(), again.data_ptr(), first.dtype, bool((again == block).all())))
        both.wait()

    on_all_cores(work, range(2), CPU)
    (first, other, again, dtype, untouched), theirs = seen
    assert first == again
    assert untouched
    assert dtype == torch.float64
    assert len({first, other, *theirs[:2]}) == 4
    large = scratch.empty("a", 2, 50)
    assert large.shape == (2, 50)
    assert large.data_ptr() == scratch.empty("a", 100).data_ptr()


def test_exponentials_are_as_exact_as_their_argument() -> None:
    x = torch.linspace(-80, 80, 100_001)
    error = (exponential(x).double() / x.double().exp() - 1).abs()
    assert (error <= 1.2e-7 * (1 + x.abs())).all()
    exponential(x, out=(same := x.clone()))
    assert torch.equal(same, exponential(x))
    assert exponential(torch.tensor([-torch.inf, 0.0])).tolist() == [0, 1]
