"""Reads YAML of unknown origin: nothing in it is executed, and its size, depth and aliases are bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from effnet_quant.errors import UserError
from effnet_quant.files import is_special, possible_path

_LONGEST, _DEEPEST, _MOST_VALUES = 2**20, 16, 2**16  # of a file; the package's largest has 5,000 values


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: plain values.

    Raises:
        UserError: there is no such file, it is a pipe or a device, it is no YAML in UTF-8, or it is too large.
    """
    path = possible_path(path)
    if is_special(path):
        raise UserError(f"{path} is a pipe or a device; give a file.")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{path} can't be read: {reason}; give a file of YAML in UTF-8.") from error
    check_size(text, str(path))
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The content of a YAML text. Call ``check_size`` before if its origin is unknown.

    Raises:
        UserError: it is no YAML. The message names ``source``.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # ValueError and the like: values that contradict their tags, e.g. a date in month 13
        raise _no_yaml(source, error) from error


def check_size(text: str, source: str) -> None:
    """Raises UserError before the YAML is built, if it is nested too deep or would grow too large by its aliases."""
    if len(text) > _LONGEST:
        raise UserError(f"{source} is longer than {_LONGEST:,} characters; give a shorter file.")
    sizes: dict[str, int] = {}  # of the values with an anchor, aliases in them written out
    opened: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size of each value that is not complete yet
    for event in _events(text, source):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            sizes |= {} if anchor is None else {anchor: size}
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor or "", _MOST_VALUES)  # an alias to a value around itself never ends
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            sizes |= {} if event.anchor is None else {event.anchor: 1}
        opened[-1] = (opened[-1][0], opened[-1][1] + size)
        if len(opened) > _DEEPEST or opened[-1][1] >= _MOST_VALUES:
            raise UserError(
                f"{source} is nested more than {_DEEPEST} deep, or has more than {_MOST_VALUES:,} values with its aliases "
                "written out; give a file that needs neither."
            )


def _events(text: str, source: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _no_yaml(source, error) from error


def _no_yaml(source: str, error: Exception) -> UserError:
    return UserError(f"{source} is no YAML: {' '.join(str(error).split())}; correct it.")
