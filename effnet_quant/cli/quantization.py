"""The flags of quantization and QAT, and the settings that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_quant.errors import UserError
from effnet_quant.quantization.choices import PTQ_RECIPES
from effnet_quant.quantization.spec import PRESETS, QuantSpec, resolve_spec
from effnet_quant.recipes.bounded_yaml import read_yaml

if TYPE_CHECKING:
    from effnet_quant.quantization.qat import QatConfig


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quant-spec and --quant-override."""
    group = parser.add_argument_group("quantization spec")
    group.add_argument(
        "--quant-spec",
        metavar="SPEC",
        help=f"{', '.join(PRESETS)}, or a YAML file (default: the weights' spec, else w8a8)",
    )
    group.add_argument(
        "--quant-override",
        metavar="PATTERN=SPEC",
        action="append",
        help="preset, or 'float', for the modules that match a pattern, e.g. 'stem=w8a16'; may be repeated",
    )


def add_qat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of training with fake quantization."""
    add = parser.add_argument_group("training with fake quantization").add_argument
    add("--gradual-start", type=int, default=0, metavar="EPOCHS", help="switch the quantizers on one by one")
    add(
        "--follow-ranges",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="let fixed ranges follow the data for so many epochs",
    )
    add(
        "--freeze-bn",
        type=int,
        metavar="EPOCH",
        help="freeze BatchNorm's statistics from this epoch on (0 is the first)",
    )
    add("--reestimate-bn", action="store_true", help="measure BatchNorm's statistics again after every epoch")
    add("--distill", metavar="FILE", help="train with a teacher: float weights of the same model")
    add("--distill-temperature", type=float, default=2.0, help="divides the outputs of teacher and student")
    add("--distill-weight", type=float, default=0.5, help="the teacher's share of the loss")


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that search for a quantization: autoquant and mixed precision."""
    add = parser.add_argument_group("search").add_argument
    add(
        "--auto",
        action="store_true",
        help="try cheap ways of quantization first, then dear ones, until --target-drop is met",
    )
    add(
        "--target-drop",
        type=float,
        metavar="POINTS",
        help="the most of the float network's score to lose; without --auto: choose the bits of each layer for it",
    )
    add(
        "--time-budget",
        metavar="TIME",
        help="with --auto: stop after so long, e.g. 90s, 20m or 2h, with the best so far",
    )
    add(
        "--hold-back",
        type=int,
        default=0,
        metavar="IMAGES",
        help="with --auto: judge on training images left out, not on val/",
    )
    add(
        "--budget",
        metavar="COST=AMOUNT",
        help="choose the bits of each layer within a budget: bit-operations=60%%, weight-bytes=52.5%% (shares of w8a8's) or "
        "latency=3.2 (ms)",
    )


def check_search(parsed: argparse.Namespace) -> None:
    """Refuse flags of ``add_search_arguments`` that do not go together.

    Raises:
        UserError: some do not.
    """
    if parsed.auto and parsed.target_drop is None:
        raise UserError("--auto climbs until a target is met; give it with --target-drop, e.g. 0.3.")
    if parsed.auto and parsed.explicit & {"calibration_method", "percentile"}:
        raise UserError(
            "--auto tries recipes, which choose ranges themselves; leave out --calibration-method and --percentile."
        )
    if parsed.budget is not None and parsed.target_drop is not None:
        raise UserError("--budget and --target-drop both say when to stop; give one of them.")
    for flag, given in (("--time-budget", parsed.time_budget), ("--hold-back", parsed.hold_back)):
        if given and not parsed.auto:
            raise UserError(f"{flag} belongs to --auto; give that too, or leave this out.")
    searches = parsed.auto or parsed.budget is not None or parsed.target_drop is not None
    if searches and (parsed.resume or parsed.evaluate):
        raise UserError(
            "a search starts from float weights; give them with --pretrained-from-file, without --resume or --evaluate."
        )
    if searches and not parsed.auto and (parsed.quant_spec or parsed.quant_override):
        raise UserError(
            "--target-drop and --budget choose the spec of each layer; leave out --quant-spec and --quant-override."
        )


def seconds_of(text: str) -> float:
    """The seconds of a time such as "90s", "20m" or "2h".

    Raises:
        UserError: the text is no time above 0.
    """
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1]]
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"--time-budget {text}: expected a number and a unit, such as 90s, 20m or 2h.") from error
    if not 0 < seconds < float("inf"):
        raise UserError(f"--time-budget {text}: a time above 0 is needed.")
    return seconds


def qat_config(parsed: argparse.Namespace) -> QatConfig:
    """Turn the flags of quant_main.py into a QatConfig.

    Raises:
        UserError: a flag's value is not allowed.
    """
    from dataclasses import fields

    from effnet_quant.quantization.qat import QatConfig

    return QatConfig(**{field.name: getattr(parsed, field.name) for field in fields(QatConfig)})


# what --ptq leaves no room for, with the reason
_NOT_WITH_PTQ = {
    "calibration_method": "the recipe chooses the ranges",
    "percentile": "the recipe chooses the ranges",
    "report": "the page shows the ranges of one calibration method",
    "evaluate": "it changes the network",
    "resume": "it starts from float weights; give them with --pretrained-from-file",
    "gradual_start": "nothing is trained",
    "follow_ranges": "nothing is trained",
    "freeze_bn": "nothing is trained",
    "reestimate_bn": "nothing is trained",
    "distill": "nothing is trained",
}


def check_ptq(parsed: argparse.Namespace) -> None:
    """Check that --ptq names a recipe and comes without flags that it excludes.

    Raises:
        UserError: it does not.
    """
    if parsed.ptq is None:
        return
    if parsed.ptq not in PTQ_RECIPES:
        raise UserError(f"--ptq {parsed.ptq}: there is no such recipe; choose one of: {', '.join(PTQ_RECIPES)}.")
    if parsed.epochs != 0:
        raise UserError("--ptq quantizes without training; add --epochs 0.")
    for name, reason in _NOT_WITH_PTQ.items():
        if name in parsed.explicit:
            raise UserError(f"--ptq and --{name.replace('_', '-')} exclude each other: {reason}.")


def asked_spec(parsed: argparse.Namespace) -> QuantSpec | None:
    """The spec of ``--quant-spec``; None without it.

    Raises:
        UserError: the preset is unknown, or the file can't be read.
    """
    given = getattr(parsed, "quant_spec", None)
    if given is None:
        return None
    return resolve_spec(read_yaml(given) if Path(given).suffix in (".yml", ".yaml") else given)


def asked_overrides(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """The pairs of pattern and preset of ``--quant-override``.

    Raises:
        UserError: one is not PATTERN=SPEC.
    """
    pairs = []
    for override in getattr(parsed, "quant_override", None) or ():
        pattern, separator, name = override.rpartition("=")
        if not separator or not pattern:
            raise UserError(f"--quant-override {override}: expected a pattern and a preset, such as 'stem=w8a16'.")
        pairs.append((pattern, name))
    return pairs
