"""Values by the names of flags, as YAML files hold them: checked, and turned into a command line."""

from __future__ import annotations

import argparse
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.recipes.recipe import nearest

Actions = dict[str, argparse.Action]


def actions_of(parser: argparse.ArgumentParser) -> Actions:
    """The parser's flags by the name of their value, e.g. "batch_size"."""
    return {action.dest: action for action in parser._actions if action.option_strings}


def spellings_of(actions: Actions) -> dict[str, str]:
    """The name of the value by each spelling of its flag, e.g. "wd" for "weight_decay"."""
    spellings = {dest: dest for dest in actions}
    for dest, action in actions.items():
        spellings |= {option.lstrip("-").replace("-", "_"): dest for option in action.option_strings}
    return spellings


def check_key(name: Any, actions: Actions, source: str) -> None:
    """Raises UserError if ``name`` is no name of a flag's value. The message names the nearest."""
    if name not in actions:
        raise unknown_key(name, actions, source)


def unknown_key(name: Any, actions: Actions, source: str) -> UserError:
    """A UserError that names the keys closest to ``name``, by the key or by a spelling of its flag."""
    spellings = spellings_of(actions)
    close = dict.fromkeys(spellings[spelling] for spelling in nearest(str(name), spellings).split(", "))
    return UserError(f"{source} has an unknown key '{name}'; did you mean: {', '.join(close)}?")


def flags_of(values: dict[str, Any], actions: Actions, source: str) -> list[str]:
    """Turn values into flags. None leaves a flag out, and a list repeats a flag that may be repeated.

    Raises:
        UserError: a key is unknown, or its value is of a kind that no flag has.
    """
    flags: list[str] = []
    for name, value in values.items():
        check_key(name, actions, source)
        action = actions[name]
        flag = next(flag for flag in reversed(action.option_strings) if flag.startswith("--"))
        if action.nargs == 0:  # a switch: the flag inverts the default
            if not isinstance(value, (bool, type(None))):
                raise UserError(f"{source}: {name} is a switch, true or false, not {value!r}.")
            flags += [flag] if value not in (None, action.default) else []
            continue
        repeated = isinstance(action, argparse._AppendAction) and isinstance(value, list)
        for single in value if repeated else [value]:
            if isinstance(single, (dict, list, tuple, set, bytes)):
                raise UserError(f"{source}: {name} is {single!r:.40}, not a single value; correct it.")
            flags += [f"{flag}={single}"] if single is not None else []
    return flags
