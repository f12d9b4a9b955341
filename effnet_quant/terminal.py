"""Text of unknown origin, such that it can't steer a terminal or forge a line of output."""

from __future__ import annotations

import shlex
import unicodedata

# control characters, formatting (e.g. right-to-left overrides), halves of surrogate pairs, separators of lines
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # formatting that scripts and emoji need


def printable(text: str) -> str:
    """The text on one line, with control characters as Python escapes: a line break becomes the two characters ``\\n``."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ESCAPED and character not in _JOINERS
        else character
        for character in text
    )


def shell_word(path: object) -> str:
    """A path for a command that a user copies: printable, and in quotes if a shell would take it apart."""
    return printable(shlex.quote(str(path)))
