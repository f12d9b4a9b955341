"""The flags of quantization and QAT, and the settings that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_quant.errors import UserError
from effnet_quant.quantization.choices import PTQ_RECIPES
from effnet_quant.quantization.spec import PRESETS, QuantSpec, resolve_spec

if TYPE_CHECKING:
    from effnet_quant.quantization.qat import QatConfig


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quant-spec and --quant-override."""
    parser.add_argument(
        "--quant-spec",
        metavar="SPEC",
        help=f"{', '.join(PRESETS)}, or a YAML file (default: the weights' spec, else w8a8)",
    )
    parser.add_argument(
        "--quant-override",
        metavar="PATTERN=SPEC",
        action="append",
        help="preset, or 'float', for the modules that match a pattern, e.g. 'stem=w8a16'; may be repeated",
    )


def add_qat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of training with fake quantization."""
    add = parser.add_argument
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
    return resolve_spec(_read_yaml(Path(given)) if Path(given).suffix in (".yml", ".yaml") else given)


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


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--quant-spec {path} can't be read: {reason}") from error
