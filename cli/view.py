"""What a run over a whole model shows: a line a block, and on a terminal a bar below them."""

from cuobs_cli import display

import cuobs
from cuobs.arrays import size_text

EACH = "each block   what its worst layer loses, drift, time, most memory until then"
DRIFT = "drift        ‖h − ĥ‖ / ‖h‖ of the states behind a block, dense h and pruned ĥ"


class View:
    """Lines on standard output; bars on standard error where that is a terminal.

    Parameters
    ----------
    quiet : bool
        Show nothing.
    """

    def __init__(self, quiet=False):
        self.began = self._explained = False
        self._quiet = quiet
        self._bar = None

    def say(self, line=""):
        """A line."""
        if not self._quiet:
            display.say(line)

    def progress(self, label, done, total):
        """How far a stage of the run is."""
        if self._quiet:
            return
        if self._bar is None:
            self._bar = display.Progress(label)
        self._bar.label = label
        if callback := self._bar.callback():
            callback(done, total)
            if done == total:
                self.close()

    def close(self):
        """Take the bar away."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None

    def starting(self, report):
        """What will be done."""
        from cuobs.models.summary import target_text

        self.began = True
        settings = report.settings
        pattern = cuobs.pattern.parse(settings["pattern_view"])
        dropped = ", first tokens left out" if settings["drop_first_token"] else ""
        self.say(f"method       {settings['method']}, damp {settings['damp']:g}")
        self.say(f"pattern      {settings['pattern']}: {pattern.keeps}")
        self.say(f"target       {target_text(settings)}{dropped}")
        if tokens := report.protocol.get("tokens"):
            each = report.protocol["tokens_a_column"]
            self.say(f"tokens       {tokens}, {each:.1f} a column of the widest layer")
        if settings.get("rotate"):
            self.say(f"rotation     {settings['rotate_steps']} steps; a tied head is untied")
        self.say(f"memory       about {size_text(report.memory_predicted)} on {settings['device']}")

    def block(self, report, blocks):
        """A block that is finished: the layer that loses most, and what the rest takes."""
        if not self._explained:
            self._explained = True
            self.say(EACH)
            if report.settings["target"] != "pruned":
                self.say(DRIFT)
        block, rotation = report.blocks[-1], report.rotation
        if rotation is not None and len(report.blocks) == 1:
            self.say(
                f"rotated      {rotation.before:.4f} of the score was pruned, {rotation.after:.4f} "
                f"now, {rotation.seconds:.1f} s"
            )
        for row in block.layers:
            if row.note:
                self.say(f"  {row.name}: {row.note}")
        self.say(block_line(report, blocks))
        self.progress(_next(block, blocks), len(report.blocks), blocks)


def block_line(report, blocks):
    """A finished block in at most 80 columns."""
    block = report.blocks[-1]
    width = len(str(blocks))
    line = f"block {block.index + 1:{width}}/{blocks}"
    losses = [
        (row.loss, label)
        for label, row in zip(block.labels(), block.layers, strict=True)
        if row.loss is not None
    ]
    if losses:
        loss, label = max(losses)
        line += f"  at most {loss:5.1%} {label:<{max(map(len, block.labels()))}}"
    if block.drift is not None:
        line += f"  drift {block.drift:5.1%}"
    line += "  read back" if block.resumed else f"  {block.seconds:5.1f} s"
    return f"{line}  {size_text(report.memory_peak)}"


def _next(block, blocks):
    done = block.index + 1
    return f"block {done + 1}/{blocks}" if done < blocks else "done"
