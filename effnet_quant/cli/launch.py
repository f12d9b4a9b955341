"""launch.py: run main.py or quant_main.py with a recipe's values."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import yaml

from effnet_quant.cli.app import example_of
from effnet_quant.cli.arguments import HelpFormatter
from effnet_quant.cli.flag_values import Actions, actions_of, check_key, flags_of
from effnet_quant.cli.process import run, typed_command
from effnet_quant.errors import UserError
from effnet_quant.recipes.recipe import Recipes, load_recipes, resolve
from effnet_quant.terminal import printable

QUANTIZING_MODES = ("calibration", "qat")


def build_parser() -> argparse.ArgumentParser:
    """The script's own flags; those of a recipe's script are apart."""
    parser = argparse.ArgumentParser(
        prog=typed_command(),
        description="Train, evaluate, calibrate or benchmark with a recipe. Further flags of main.py or quant_main.py "
        "override the recipe's values.",
        epilog=example_of(typed_command()),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="e.g. efficientnet-b0")
    parser.add_argument("--mode", help="e.g. convergence, evaluate, benchmark_training, benchmark_inference, qat")
    parser.add_argument("--platform", help="e.g. DGXA100, H100, CPU")
    parser.add_argument("--precision", help="AMP, TF32 or FP32")
    parser.add_argument(
        "--cfg_file", "--cfg-file", metavar="FILE", help="your own recipes (YAML), which override the built-in ones"
    )
    parser.add_argument("--list", action="store_true", help="show the recipes and exit")
    parser.add_argument("--dry-run", action="store_true", help="show the resolved configuration and exit")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Run the recipe that the command line names. Other flags go to the script and override the recipe."""
    parsed, rest = build_parser().parse_known_args(arguments)
    from effnet_quant.cli import main as main_script
    from effnet_quant.cli import quant_main as quant_script

    recipes = load_recipes(parsed.cfg_file)
    source = parsed.cfg_file or "the recipe"
    _check_keys(recipes, actions_of(main_script.build_parser()) | actions_of(quant_script.build_parser()), source)
    if parsed.list:
        print(_listing(recipes))
        return 0
    chosen = {name: getattr(parsed, name) for name in ("model", "mode", "platform", "precision")}
    missing = [f"--{name}" for name, value in chosen.items() if value is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be given; --list shows what there is.")
    values = resolve(recipes, **chosen)
    from effnet_quant.models.registry import get_entry

    quantized = get_entry(values["arch"]).quantized
    if quantized is None:  # the network exists as float and quantized
        quantized = parsed.mode in QUANTIZING_MODES
    script = quant_script if quantized else main_script
    command = [*flags_of(values, actions_of(script.build_parser()), source), *rest]
    if parsed.dry_run:
        resolved = vars(script.build_parser().parse(command))
        del resolved["explicit"]
        name = _command_of(script, typed_command())
        print(f"# {name} {shlex.join(command)}\n{yaml.safe_dump(resolved, sort_keys=True)}", end="")
        return 0
    return script.job(command)


def _command_of(script: ModuleType, typed: str) -> str:
    """The command of a script without a recipe, for a user who typed "launch.py" or "effnet-quant launch"."""
    name = script.__name__.rpartition(".")[2]
    program, _, verb = typed.rpartition(" ")
    if verb != "launch":
        return f"python {name}.py"
    return f"{program} {'quantize' if name == 'quant_main' else 'train --defaults nvidia'}"


def _check_keys(recipes: Recipes, actions: Actions, source: str) -> None:
    """Check that the keys of all rows, chosen or not, are flags of one of the scripts."""
    rows = [values for section in ("precision", "platform", "mode") for values in recipes[section].values()]
    rows += [row for modes in _mappings(recipes["model_mode"]) for row in modes.values()]
    rows += [row for rows_of in _mappings(recipes["models"]) for part in _mappings(rows_of) for row in part.values()]
    for row in rows:
        for name in row if isinstance(row, dict) else ():
            check_key(name, actions, source)


def _mappings(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for value in values.values() if isinstance(value, dict)]


def _listing(recipes: Recipes) -> str:
    lines = ["modes", *(f"  {mode}" for mode in recipes["mode"]), "models, platforms and precisions (batch size)"]
    for model, platforms in recipes["models"].items():
        lines.append(f"  {model}")
        for platform, precisions in (platforms or {}).items():
            sizes = {name: (values or {}).get("batch_size", "default") for name, values in (precisions or {}).items()}
            lines.append(f"    {platform:10} {', '.join(f'{name} ({size})' for name, size in sizes.items())}")
    return "\n".join(map(printable, lines))


def main() -> None:
    """Entry point of the script."""
    run(job)
