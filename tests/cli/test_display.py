import io
import re
import warnings

import pytest
from cuobs_cli import display, group


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """What was written last, without colours and the moves of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue()).rpartition("\r")[2]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_progress_tells_the_time_left(terminal):
    now = [100.0]
    with display.Progress("admm", terminal, lambda: now[0]) as progress:
        show = progress.callback()

        def seen(done, total, after):
            now[0] += after
            show(done, total)
            progress._bars.refresh()
            text = terminal.shown()
            assert len(text) <= 80
            return text

        assert re.match(r"admm \S+ +10% --:-- left", seen(1, 10, 0))
        assert "20%" in seen(2, 10, 10)
        assert re.search(r"30% 01:10 left", seen(3, 10, 10))
        progress.label = "exact"
        assert re.match(r"exact \S+ +2% --:-- left", seen(1, 50, 10))  # the old pace is no guide
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[2K")  # nothing stays


def test_no_colour_where_none_is_wanted(terminal, monkeypatch):
    def drawn():
        terminal.truncate(0)
        with display.Progress("admm", terminal) as progress:
            progress(1, 2)
        return re.findall(r"\x1b\[[0-9;]*m", terminal.getvalue())

    assert any("3" in code for code in drawn())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(re.search(r"\b3[0-9]|38;", code) for code in drawn())


def on_screen(text):
    """The lines that a terminal shows after a text with the moves of the cursor that rich makes."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            line, end = lines[row].ljust(column), column + len(part)
            lines[row], column = line[:column] + part + line[end:], end
    return [line for line in lines if line]


def test_lines_come_above_the_bar_which_stays(terminal, monkeypatch):
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    now = [0.0]
    with display.Progress("admm", terminal, lambda: now[0]) as progress:
        for done in range(3):
            display.say(f"line {done}", err=done == 1)
            progress(done, 10)
            now[0] += 5
        progress(3, 10)
        display.say("a line")
        *lines, bar = on_screen(terminal.getvalue())
        assert lines == ["line 0", "line 1", "line 2", "a line"]
        assert re.match(r"admm ━+.* 30% 00:35 left", bar)  # its pace is not forgotten
    assert on_screen(terminal.getvalue()) == lines
    with group.one_sentence():
        progress(4, 10)
        warnings.warn("of something", stacklevel=1)
    assert on_screen(terminal.getvalue()) == [*lines, "Warning: of something"]


def test_progress_is_silent_elsewhere(capsys):
    with display.Progress("admm") as progress:
        assert progress.callback() is None
    assert capsys.readouterr().err == ""
