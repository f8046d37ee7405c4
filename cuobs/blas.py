"""The threads of NumPy's and SciPy's BLAS, which belong to the whole process."""

import threading
from functools import lru_cache

from threadpoolctl import ThreadpoolController


class _OneThread:
    """A limit of one thread that counts its holders.

    The first of the contexts that overlap sets it, and the last one restores what the first found.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._holders = 0
        self._limit = None

    def __enter__(self):
        with self._lock:
            if not self._holders:
                self._limit = _libraries().limit(limits=1, user_api="blas")
            self._holders += 1

    def __exit__(self, *error):
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._limit.restore_original_limits()


_ONE_THREAD = _OneThread()


def one_thread():
    """A context in which BLAS takes one thread, in all threads of the process.

    Its pools fight over the same cores: one spins while it waits for work, the other computes.
    """
    return _ONE_THREAD


@lru_cache(maxsize=1)
def _libraries():
    import scipy.linalg  # noqa: F401

    # Loaded libraries are looked up once; that takes longer than a small factorisation.
    return ThreadpoolController()
