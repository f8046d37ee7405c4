"""Hidden states of all calibration windows, of the dense model and of the pruned one side by side.

Both go through the model block by block. Inside a block they stop before each group of linears,
where the sums that the group needs are taken, and go on when it is pruned.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from cuobs.models import memory
from cuobs.models.blocks import run, windows_of
from cuobs.models.pruning.scratch import at_home
from cuobs.models.pruning.walk import Stops


@dataclass
class Streams:
    """Where the windows stand between two blocks.

    Attributes
    ----------
    dense : list of tensor, shape (B, T, D), or None
        Hidden states in the dense model, batch by batch; None where they are not followed.
    pruned : list of tensor, shape (B, T, D)
        Those in the model as it is pruned so far.
    calls : list of list of (tuple, dict)
        For each block and each batch, the block's other arguments; see `blocks.capture`.
    counts : list of tensor of bool, shape (B, T), or None
        Which tokens of a batch enter the sums; None if all do.
    room : cuobs.models.memory.Room
    held : int
        Batches whose forwards wait inside a block while a group is pruned. Those of the others are
        run again from the block's start, which takes longer and less memory.
    """

    dense: list
    pruned: list
    calls: list
    counts: list
    room: memory.Room
    held: int = 0
    _places: dict = field(default_factory=dict)

    @classmethod
    def begin(cls, hidden, calls, counts, follow, room, held=0):
        """Both streams from the hidden states that enter the first block."""
        return cls(hidden.copy() if follow else None, hidden, calls, counts, room, held)

    def first_window(self, index):
        """Hidden states of one window that enter a block, and the block's other arguments."""
        hidden = self.pruned[0]
        return hidden[:1], windows_of(self.calls[index][0], 0, 1, len(hidden))

    def places(self, batch, start, stop):
        """The places of the tokens that count among those of some windows; None if all do.

        They are looked for once: a GPU is waited for where their number comes out.
        """
        if self.counts[batch] is None:
            return None
        key = batch, start, stop
        if key not in self._places:
            counted = self.counts[batch][start:stop].flatten()
            self._places[key] = counted.nonzero().flatten()
        return self._places[key]

    def drift(self):
        """‖h − ĥ‖² and ‖h‖² over the tokens that count: a tensor of two."""
        sums = torch.zeros(2, dtype=torch.float32, device=self.pruned[0].device)
        for batch, pair in enumerate(zip(self.dense, self.pruned, strict=True)):
            counted = self.places(batch, 0, len(pair[0]))
            h, hh = (_take(x.flatten(0, 1), counted).float() for x in pair)
            sums += torch.stack([(h - hh).square().sum(), h.square().sum()])
        return sums


@dataclass
class Passage:
    """The way of both streams through one block, group by group.

    Parameters
    ----------
    streams : Streams
    index : int
        Of the block.
    block : torch.nn.Module
        That which is pruned on the way.
    dense : torch.nn.Module or None
        A copy that stays as it was.
    plan : Plan
    residual : bool
        Whether the residual stream is wanted too.

    Used as a context; forwards that still wait are ended with it.
    """

    streams: Streams
    index: int
    block: torch.nn.Module
    dense: torch.nn.Module
    plan: object = None
    residual: bool = False
    _stops: dict = field(default_factory=dict)
    _waiting: dict = field(default_factory=dict)

    def __enter__(self):
        if self.plan is not None:
            for name, block in ("pruned", self.block), ("dense", self.dense):
                if block is not None:
                    self._stops[name] = Stops(block, self.plan, self.residual).__enter__()
        return self

    def __exit__(self, *_):
        self._let_go()
        for stops in self._stops.values():
            stops.__exit__()

    def inputs(self, place, dense, residual, function):
        """Show a function what enters a group, batch by batch.

        Parameters
        ----------
        place : int
            The group's place in the plan.
        dense, residual : bool
            Whether the dense model's inputs are wanted, and the residual streams.
        function : callable
            Called with (X̂, X, h, ĥ) of the tokens that count: inputs (tokens, K) in the pruned
            and the dense model, residual streams (tokens, D) in the dense and the pruned one; what
            is not wanted is None.
        """
        names = ("pruned", "dense") if dense or residual else ("pruned",)

        def part(batch, start, stop):
            walks = self._walks(names, batch, start, stop)
            try:
                found = [walk.until(place) for walk in walks]
                chosen = self.streams.places(batch, start, stop)
                Xh, X = _take(found[0][0], chosen), _take(found[1][0], chosen) if dense else None
                h = hh = None
                if residual:
                    h, hh = _take(found[1][1], chosen), _take(found[0][1], chosen)
                del found
                self._trim()
                function(Xh, X, h, hh)
            finally:
                self._release(walks)

        for batch, hidden in enumerate(at_home(self.streams.pruned)):
            self._each(len(hidden), partial(part, batch))

    def steps(self):
        """What a forward of the first batch does from stop to stop, one call each."""
        (walk,) = self._walks(("pruned",), 0, 0, len(self.streams.pruned[0]))
        try:
            for place in range(len(self.plan.groups)):
                yield partial(walk.until, place)
            yield walk.finish
        finally:
            walk.close()

    def leave(self, name, anew=False):
        """Let a stream's hidden states be those that leave the block.

        Parameters
        ----------
        name : {"dense", "pruned"}
        anew : bool
            Whether weights have changed behind forwards that wait.
        """
        if anew:
            self._let_go()
        states = getattr(self.streams, name)
        # One by one into place: a second copy of all of them may not fit.
        for batch in range(len(states)):
            states[batch] = self._out(name, batch)
            self._trim()

    def _out(self, name, batch):
        states = getattr(self.streams, name)
        count = len(at_home(states)[batch])

        def part(start, stop):
            walk = self._waiting.get((name, batch))
            if walk is None:
                block = self.block if name == "pruned" else self.dense
                call = windows_of(self.streams.calls[self.index][batch], start, stop, count)
                with torch.no_grad():
                    return run(block, states[batch][start:stop], call)
            out = walk.finish()
            self._waiting.pop((name, batch)).close()
            return out

        parts = self._each(count, part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _each(self, count, part):
        """`Room.each`; where the device is full, forwards that wait are given up first."""

        def attempt(start, stop):
            try:
                return part(start, stop)
            except torch.cuda.OutOfMemoryError:
                if not self._waiting:
                    raise
            self._let_go()
            self.streams.held = 0
            return part(start, stop)

        return self.streams.room.each(count, attempt)

    def _walks(self, names, batch, start, stop):
        """A forward of each named stream: one that waits, if there is, else a new one."""
        walks = []
        for name in names:
            walk = self._waiting.get((name, batch))
            if walk is None:
                hidden = getattr(self.streams, name)[batch]
                call = windows_of(self.streams.calls[self.index][batch], start, stop, len(hidden))
                walk = self._stops[name].start(hidden[start:stop], call)
                if batch < self.streams.held and stop - start == len(hidden):
                    self._waiting[name, batch] = walk
            walks.append(walk)
        return walks

    def _release(self, walks):
        waiting = {id(walk) for walk in self._waiting.values()}
        for walk in walks:
            if id(walk) not in waiting:
                walk.close()

    def _trim(self):
        """Give back what forwards leave behind: each has a thread and with it a heap of its own."""
        memory.trim(next(self.block.parameters()).device)

    def _let_go(self):
        for walk in self._waiting.values():
            walk.close()
        self._waiting.clear()


def _take(x, chosen):
    """The rows of a tensor at some places, or all."""
    return x if chosen is None else x.index_select(0, chosen)
