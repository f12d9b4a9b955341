"""Shows the progress of long work: a bar on a terminal, plain lines elsewhere, both with the remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


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


def lines_of_steps(seconds: float = 5.0) -> Callable[[str, int, int], None]:
    """A function that is told a title and how many of all parts are done. It prints a line at most every ``seconds``."""
    started: dict[str, float] = {}
    printed = time.monotonic()

    def show(title: str, done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        start = started.setdefault(title, now)
        if now - printed < seconds or not done:
            return
        printed = now
        left = (now - start) / done * (total - done)
        print(f"{title}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return show
