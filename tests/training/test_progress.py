"""A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys

from effnet_quant.training.progress import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_lines_say_how_many_are_done_and_how_long_the_rest_takes(capsys):
    assert list(progress("abcde", 5, "work", every=2)) == list("abcde")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+ s", "N s", line) for line in lines] == [
        "work: 2/5, N s left",
        "work: 4/5, N s left",
        "work: 5/5, N s left",
    ]


def test_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(range(3), 3, "work", every=1)) == [0, 1, 2]
    assert "work:   0%" in terminal.getvalue()
    assert re.search(r"\d\d:\d\d<", terminal.getvalue())  # elapsed<left
    assert "s left" not in terminal.getvalue()
