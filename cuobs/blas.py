"""The threads of NumPy's and SciPy's BLAS, which mostly belong to the whole process."""

import contextlib
import threading
from functools import lru_cache

from threadpoolctl import ThreadpoolController


@contextlib.contextmanager
def one_thread():
    """A context in which BLAS takes one thread.

    Its pools fight over the same cores: one spins while it waits for work, the other computes.
    Contexts may overlap in threads, and leave BLAS as the first of them has found it.
    """
    with _libraries("openmp").limit(limits=1, user_api="blas"), _SHARED:
        yield


class _Shared:
    """A limit of one thread on the pools of the process, which counts its holders.

    The first of those that overlap sets it, and the last one restores what the first has found.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._holders = 0
        self._limit = None

    def __enter__(self):
        with self._lock:
            if not self._holders:
                _release()
                self._limit = _libraries("shared").limit(limits=1, user_api="blas")
            self._holders += 1

    def __exit__(self, *error):
        with self._lock:
            self._holders -= 1
            if not self._holders:
                _release()
                self._limit.restore_original_limits()
                _release()


_SHARED = _Shared()


def _release():
    """Let this thread set limits: newer threadpoolctl lets only the first one that did so."""
    for library in _libraries("shared").lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


@lru_cache(maxsize=2)
def _libraries(kind):
    """The loaded libraries that have a pool for each thread ("openmp"), or one for all."""
    import scipy.linalg  # noqa: F401

    # Looked up once; that takes longer than a small factorisation.
    every = ThreadpoolController()
    return every.select(filepath=[
        library.filepath for library in every.lib_controllers
        if (getattr(library, "threading_layer", None) == "openmp") == (kind == "openmp")
    ])
