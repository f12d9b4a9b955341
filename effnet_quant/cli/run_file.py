"""run.yml: the flags of a run, written beside its checkpoints and read by --config."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_quant import __version__
from effnet_quant.cli.flag_values import actions_of, flags_of, spellings_of, unknown_key
from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.recipes.bounded_yaml import read_yaml

if TYPE_CHECKING:
    from effnet_quant.jobs.run import Run

FILENAME = "run.yml"
_NOT_OF_THE_RUN = {"config", "debug", "help"}  # flags that such a file can't hold
DATA = "data"  # the one value that is no flag
DEFAULTS = "defaults"  # whose values flags have that are not in the file


def read_run_file(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values of a file for --config, by the names of ``parser``'s values. A key may be any spelling of a flag.

    Raises:
        UserError: the file can't be read, is no mapping, or has an unknown key.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no flags; a line of it is a flag's name and its value, such as 'epochs: 10'.")
    actions = {dest: action for dest, action in actions_of(parser).items() if dest not in _NOT_OF_THE_RUN}
    spellings = {**spellings_of(actions), DATA: DATA}
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key == DEFAULTS and key not in actions:
            continue  # main.py has NVIDIA's, and no flag for them
        name = spellings.get(str(key).replace("-", "_"))
        if name is None:
            raise unknown_key(key, actions, path)
        if name in values:
            raise UserError(f"{path} has the flag --{name.replace('_', '-')} twice, under two names; leave one out.")
        values[name] = value
    if not isinstance(values.get(DATA, ""), str):
        raise UserError(f"{path}: {DATA} is {values[DATA]!r:.40}, not a name; put it in quotes.")
    return values


def with_run_file(arguments: list[str], path: str, given: set[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line with the file's values in front, except those that it gives itself.

    Args:
        arguments: the command line.
        path: the file.
        given: the names of the values that the command line gives.
        parser: the script's flags.

    Raises:
        UserError: the file can't be used.
    """
    values = {name: value for name, value in read_run_file(path, parser).items() if name not in given}
    data = [values.pop(DATA)] if DATA in values else []
    return [*data, *flags_of(values, actions_of(parser), path), *arguments]


def write_run_file(run: Run, parsed: argparse.Namespace, verb: str, chosen: Collection[str] = ()) -> None:
    """Write run.yml to the workspace of a training, so that --config repeats it.

    It has the values that were given, those of ``chosen``, and those that were drawn or that depend on the machine: the
    seed and the number of workers. A resumed run leaves the file of its beginning as it is. Runs without checkpoints write
    none.

    Raises:
        UserError: the file can't be written.
    """
    path = Path(parsed.workspace) / FILENAME
    if not run.world.is_main or parsed.evaluate or not run.config.save_checkpoints:
        return
    if parsed.resume and path.is_file():
        return
    import torch
    import yaml

    values = {name: getattr(parsed, name) for name in (parsed.explicit | set(chosen)) - _NOT_OF_THE_RUN}
    if verb == "train":
        values[DEFAULTS] = getattr(parsed, DEFAULTS, "nvidia")
    values |= {"seed": run.config.seed, "workers": run.config.workers}
    processes = "" if run.world.size == 1 else f", in {run.world.size} processes"
    head = (
        f"# The flags of a run of effnet-quant {__version__} with torch {torch.__version__}{processes}. Repeat it:\n"
        f"#   effnet-quant {verb} --config {FILENAME} --workspace NEW\n"
    )
    replace_file(path, (head + yaml.safe_dump(values, allow_unicode=True)).encode())
