"""Shows the progress of long work: a bar on a terminal, plain lines elsewhere, both with the remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
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
