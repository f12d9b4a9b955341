"""Which images could not be read, and when they are too many."""

from __future__ import annotations

import sys

from effnet_quant.errors import UserError


class BadImages:
    """The unreadable images of one source: each is reported once on standard error, and counted once.

    Args:
        limit: how many there may be.

    Attributes:
        sentences: what is wrong with each, by its index in the source.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self.sentences: dict[int, str] = {}

    def add(self, index: int, sentence: str) -> None:
        """Note that an image can't be read.

        Raises:
            UserError: there are more of them than the limit.
        """
        if index in self.sentences:
            return
        self.sentences[index] = sentence
        if self._limit == 0:
            raise UserError(sentence)
        if len(self.sentences) > self._limit:
            raise UserError(f"{sentence[:-1]}; that is one more than --max-bad-images {self._limit} lets pass.")
        print(f"warning: {sentence} It is left out.", file=sys.stderr, flush=True)
