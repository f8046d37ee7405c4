"""What a person sees while work goes on: bars with the time left, on a terminal alone.

Drawn by rich, which is imported when there is a terminal to draw on. It leaves colours out where
NO_COLOR is set.
"""

import sys

import click

# The bars that are on the terminal now: a line of something else has to come above them.
_DRAWN = []


def say(line="", err=False):
    """Print a line, above the bar where one is drawn."""
    drawn = list(_DRAWN)
    clear()
    click.echo(line, err=err)
    for progress in drawn:
        progress.draw()


def clear():
    """Take away the bars that are on the terminal."""
    for progress in list(_DRAWN):
        progress.clear()


class Progress:
    """A bar that goes away when the work is done; silence in a pipe.

    Parameters
    ----------
    label : str
        What is being done; may be set anew as the work goes on.
    stream : file, optional
        stderr by default.
    clock : callable, optional
        Seconds.
    """

    def __init__(self, label, stream=None, clock=None):
        self.label = label
        self._stream = stream or sys.stderr
        self._clock = clock
        self._bars = None
        self._position = (0, 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clear()

    def draw(self):
        """Put the bar on the terminal."""
        if self not in _DRAWN:
            _DRAWN.append(self)  # first: who is interrupted between takes it away all the same
            self._bars.start()

    def clear(self):
        """Take the bar away; it comes back with the next step, as far as it was."""
        if self in _DRAWN:
            self._bars.stop()
            _DRAWN.remove(self)

    def callback(self):
        """What to give as ``progress``: None unless somebody looks."""
        return self if self._stream.isatty() else None

    def __call__(self, done, total):
        if self not in _DRAWN and done >= total:
            return  # a stage of one step: there is nothing to wait for
        if self._bars is None:
            self._bars = bars(self._stream, self._clock)
            self._task = self._bars.add_task(self.label, total=total, completed=done)
        elif total != self._position[1] or done < self._position[0]:
            # Another stage has begun, and the old pace is no guide.
            self._bars.reset(self._task, total=total, completed=done)
        self._position = (done, total)
        self._bars.update(self._task, description=self.label, completed=done)
        self.draw()


def bars(stream, clock=None):
    """Bars of rich with a label, the share that is done and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TimeLeft(compact=True), TextColumn("left"),
        console=Console(file=stream), transient=True, get_time=clock,
        # Not by rich: click writes past what it puts in the place of the streams.
        redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
