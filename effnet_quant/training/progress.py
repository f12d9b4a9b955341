"""Shows the progress of long work: a bar on a terminal, plain lines elsewhere, both with the remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0


def progress(items: Iterable[T], total: int, title: str, every: int) -> Iterator[T]:
    """Yield ``items``, and show how many of ``total`` are done and how long the rest will take.

    Args:
        items: the items.
        total: number of items.
        title: name of the work.
        every: items between two lines if standard error is not a terminal.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, dynamic_ncols=True, leave=False)
        return
    start = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done % every == 0 or done == total:
            left = (time.monotonic() - start) / done * (total - done)
            print(f"{title}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in words: "45 s", "12 min" or "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class ProgressLines:
    """Shows the parts of long work, one after another, on standard error: how much is done, and how long the rest will take.

    Call it with a title, how many items of the part are done, and how many there are. A new title starts a new part.

    Args:
        seconds: between two lines of a part.
    """

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self._seconds = seconds
        self._title = ""
        self._start = self._shown = 0.0

    def __call__(self, title: str, done: int, total: int) -> None:
        now = time.monotonic()
        if title != self._title:
            self._title, self._start, self._shown = title, now, now
        if done < total and now - self._shown < self._seconds:
            return
        self._shown = now
        left = f", {(now - self._start) / done * (total - done):.0f} s left" if done else ""
        print(f"{title}: {done}/{total}{left}", file=sys.stderr, flush=True)
