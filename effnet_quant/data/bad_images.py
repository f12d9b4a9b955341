"""Counts unreadable images, and stops when there are too many."""

from __future__ import annotations

import sys

from effnet_quant.errors import UserError


class BadImages:
    """The unreadable images of one source. Each is counted once, and reported once on standard error.

    Args:
        limit: how many unreadable images are accepted.

    Attributes:
        sentences: by an image's index in the source, what is wrong with it.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self.sentences: dict[int, str] = {}

    def add(self, index: int, sentence: str) -> None:
        """Note that an image can't be read.

        Raises:
            UserError: there are more unreadable images than the limit.
        """
        if index in self.sentences:
            return
        self.sentences[index] = sentence
        if self._limit == 0:
            raise UserError(sentence)
        if len(self.sentences) > self._limit:
            raise UserError(f"{sentence[:-1]}; that is one more than --max-bad-images {self._limit} lets pass.")
        print(f"warning: {sentence} It is left out.", file=sys.stderr, flush=True)
