"""Processes of the tests' own, forked: a program of a few lines, with PyTorch imported already."""

import multiprocessing
import os
import signal
import sys

FORK = multiprocessing.get_context("fork")


def start(function, *args, said=os.devnull):
    """A started process that calls a function; what it says goes to a file, faults to FILE.err."""
    process = FORK.Process(target=_run, args=(function, args, said))
    process.start()
    return process


def _run(function, args, said):
    # A test run in the background ignores it, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults = said if said == os.devnull else f"{said}.err"
    for number, name, path in (1, "stdout", said), (2, "stderr", faults):
        stream = open(path, "w", buffering=1)
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)
    function(*args)
