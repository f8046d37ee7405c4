"""Forwards of a block that stop before a group of linears and go on from there.

Pruning a group changes weights that lie ahead of where a forward stands. So a forward may wait
there, instead of being run again from its start for each group.
"""

import threading

import torch

from cuobs.models.blocks import run
from cuobs.models.structure import linears
from cuobs.models.threads import callers_stream


class _Stop(Exception):
    """Ends a forward that is no longer wanted."""


class Stops:
    """The places of a block where forwards may stop: before each group of its plan.

    Parameters
    ----------
    block : torch.nn.Module
    plan : Plan
    stream : bool
        Whether the residual stream is followed from writer to writer.

    Used as a context: the block has hooks meanwhile.
    """

    def __init__(self, block, plan, stream):
        self.block = block
        self._here = threading.local()
        self._plan, self._stream = plan, stream
        self._handles = []

    def __enter__(self):
        modules = linears(self.block)
        for place, group in enumerate(self._plan.groups):
            self._watch(modules[group.names[0]].register_forward_pre_hook, self._arrive, place)
        if self._stream:
            for name in self._plan.writers:
                self._watch(modules[name].register_forward_hook, self._wrote, None)
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def start(self, hidden, call):
        """A `Walk` of hidden states (B, T, D) through the block, with its other arguments."""
        return Walk(self, hidden, call)

    def _watch(self, register, function, place):
        def hook(_, args, output=None):
            walk = getattr(self._here, "walk", None)
            if walk is not None:
                function(walk, place, args[0], output)

        self._handles.append(register(hook))

    @staticmethod
    def _arrive(walk, place, x, _):
        walk.arrive(place, x)

    @staticmethod
    def _wrote(walk, _, x, output):
        walk.stream = walk.stream + output.reshape(walk.stream.shape)


class Walk:
    """One forward, in a thread of its own that never runs beside the caller's."""

    def __init__(self, stops, hidden, call):
        self.stream = hidden.reshape(-1, hidden.shape[-1])
        self._go, self._come = threading.Semaphore(0), threading.Semaphore(0)
        self._place, self._found, self._error = None, None, None
        self._ended = self._closed = False
        # A daemon, since an interrupt must not wait for a forward that waits itself.
        self._thread = threading.Thread(
            target=self._run, args=(stops, hidden, call, callers_stream(hidden.device)), daemon=True
        )
        self._thread.start()

    def until(self, place):
        """The input (tokens, K) of the group at a place, and the residual stream there."""
        x = self._advance(place)
        return x.reshape(-1, x.shape[-1]), self.stream

    def finish(self):
        """The hidden states that leave the block."""
        return self._advance(None)

    def close(self):
        """End the forward where it stands."""
        self._closed = True
        if not self._ended:
            self._go.release()
        self._thread.join()
        self._found = self._error = self.stream = None

    def _advance(self, place):
        self._place, self._found = place, None
        self._go.release()
        self._come.acquire()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds the forward's tensors
        return self._found

    def arrive(self, place, x):
        """Wait at a place, if it is the one that the caller wants."""
        if place != self._place:
            return
        self._found = x
        self._come.release()
        del x
        self._go.acquire()
        if self._closed:
            raise _Stop

    def _run(self, stops, hidden, call, stream):
        self._go.acquire()
        stops._here.walk = self
        try:
            with torch.no_grad(), stream():
                if not self._closed:
                    self._found = run(stops.block, hidden, call)
        except _Stop:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del hidden, call
            self._ended = True
            self._come.release()
