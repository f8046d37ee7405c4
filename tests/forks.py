"""Processes of the tests' own, forked: a program of a few lines, with PyTorch imported already."""

import multiprocessing
import os
import signal
import sys
import threading
import time

FORK = multiprocessing.get_context("fork")


def start(function, *args, said=os.devnull):
    """A started process that calls a function; what it says goes to a file, faults to FILE.err."""
    _settle()
    process = FORK.Process(target=_run, args=(function, args, said))
    process.start()
    return process


def _settle():
    """Wait until the other threads sleep.

    A thread that is joined may still be ending, and give its buffers back to MKL under a lock; in
    a process that is forked meanwhile nobody ever lets go of that lock.
    """
    until = time.monotonic() + 10
    while not _others_sleep() and time.monotonic() < until:
        time.sleep(0.001)


def _others_sleep():
    tasks, mine = "/proc/self/task", str(threading.get_native_id())
    try:
        states = [
            open(f"{tasks}/{task}/stat").read().rpartition(") ")[2][0]
            for task in os.listdir(tasks)
            if task != mine
        ]
    except (FileNotFoundError, ProcessLookupError):  # one has ended, or this is no Linux
        return not os.path.exists(tasks)
    return set(states) <= {"S"}


def _run(function, args, said):
    # A test run in the background ignores it, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults = said if said == os.devnull else f"{said}.err"
    for number, name, path in (1, "stdout", said), (2, "stderr", faults):
        stream = open(path, "w", buffering=1)
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)
    function(*args)
