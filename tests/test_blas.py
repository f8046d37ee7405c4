"""The limit of BLAS's threads while calls overlap."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import cuobs
from cuobs import blas


def threads():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.fixture
def two_threads():
    """As many as BLAS has before the calls; the session's own limit is one."""
    with threadpool_limits(2, user_api="blas"):
        if set(threads()) != {2}:
            pytest.skip("BLAS takes no limit here")
        yield


def test_the_last_holder_restores_what_the_first_found(two_threads):
    with blas.one_thread():
        with blas.one_thread():
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert set(threads()) == {2}


def test_overlapping_calls_leave_the_threads_as_they_were(two_threads):
    """Each enters while another is inside, some raise, and they leave in another order."""
    entered, leave, found = threading.Barrier(4), [threading.Event() for _ in range(4)], []

    def hold(number):
        try:
            with blas.one_thread():
                entered.wait(10)
                leave[number].wait(10)
                found.append(set(threads()))
                if number % 2:
                    raise RuntimeError("a call that fails")
        except RuntimeError:
            pass

    callers = [threading.Thread(target=hold, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for number in (2, 0, 3, 1):
        leave[number].set()
        callers[number].join()
    assert found == [{1}] * 4
    assert set(threads()) == {2}


def test_overlapping_prunes_leave_the_threads_as_they_were(two_threads):
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((16, 64)), rng.standard_normal((256, 64))
    results = [None] * 4

    def prune(number):
        results[number] = cuobs.prune(W, X, method="true-obs", workers=2)

    callers = [threading.Thread(target=prune, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert set(threads()) == {2}
    assert all((r.mask == results[0].mask).all() for r in results)
