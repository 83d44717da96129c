"""Several threads give what one gives: the same results, in order, and the same first error."""

import itertools
import threading

import pytest

from murmur.protocol.threads import in_order, processors


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_pieces(threads: int) -> None:
    assert list(in_order(lambda: lambda x: x * x, range(100), threads=threads)) == [x * x for x in range(100)]
    assert list(in_order(lambda: str, [], threads=threads)) == []


def test_every_thread_has_a_worker_of_its_own() -> None:
    """Three pieces that wait for each other need three threads at once; each finds what it left in its worker."""
    met, count = threading.Barrier(3, timeout=60), itertools.count()

    def make():
        number = next(count)

        def work(_: int) -> tuple[int, int]:
            met.wait()
            return number, threading.get_ident()

        return work

    found = list(in_order(make, range(3), threads=3))
    assert len({number for number, _ in found}) == len({thread for _, thread in found}) == 3


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_error_is_raised_in_its_place(threads: int) -> None:
    def check(x: int) -> int:
        if x in (7, 9):
            raise ValueError(f"piece {x}")
        return x

    done: list[int] = []
    with pytest.raises(ValueError, match="piece 7"):
        for x in in_order(lambda: check, range(50), threads=threads):
            done.append(x)
    assert done == list(range(7))


@pytest.mark.parametrize("threads", [2, 3])
def test_few_pieces_are_taken_ahead_of_the_caller(threads: int) -> None:
    taken: list[int] = []

    def pieces():
        for x in range(1000):
            taken.append(x)
            yield x

    results = in_order(lambda: int, pieces(), threads=threads)
    next(results)
    assert len(taken) <= 2 * threads + 1
    results.close()


def test_one_processor_at_least() -> None:
    assert processors() >= 1
