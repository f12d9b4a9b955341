"""The exceptions that a script ends with in a sentence of its own."""

from __future__ import annotations

from effnet_quant.terminal import printable


class UserError(Exception):
    """Something a user can put right: one sentence that says what was wrong, where, and what to do.

    Scripts print the sentence and exit with status 2; library callers catch it like any exception. Control characters in
    it, as from names in a file, are escaped (``printable``).
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class PeerLost(Exception):
    """Another process of the job has ended, so this one can't go on; the other one knows why."""
