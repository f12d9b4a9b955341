"""The flags that say how a network is quantized, and how it is trained so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_quant.errors import UserError
from effnet_quant.quantization.spec import PRESETS, QuantSpec, resolve_spec

if TYPE_CHECKING:
    from effnet_quant.quantization.qat import QatConfig


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """--quant-spec and --quant-override."""
    parser.add_argument(
        "--quant-spec",
        metavar="SPEC",
        help=f"{', '.join(PRESETS)}, or a YAML file (default: what the weights say, else w8a8)",
    )
    parser.add_argument(
        "--quant-override",
        metavar="PATTERN=SPEC",
        action="append",
        help="another preset, or 'float', for the modules that a pattern matches, e.g. 'stem=w8a16'; may be repeated",
    )


def add_qat_arguments(parser: argparse.ArgumentParser) -> None:
    """How to train with fake quantization."""
    add = parser.add_argument
    add("--gradual-start", type=int, default=0, metavar="EPOCHS", help="switch the quantizers on one after another")
    add("--follow-ranges", type=int, default=0, metavar="EPOCHS", help="let fixed ranges follow the data at first")
    add(
        "--freeze-bn",
        type=int,
        metavar="EPOCH",
        help="from this epoch (0 is the first) on, leave BatchNorm's statistics",
    )
    add("--reestimate-bn", action="store_true", help="measure BatchNorm's statistics anew after every epoch")
    add("--distill", metavar="FILE", help="float weights of the same model, a teacher for the training")
    add("--distill-temperature", type=float, default=2.0, help="divides the outputs of teacher and student")
    add("--distill-weight", type=float, default=0.5, help="the teacher's share of the loss")


def qat_config(parsed: argparse.Namespace) -> QatConfig:
    """The settings that the flags of quant_main.py mean.

    Raises:
        UserError: a flag has a value that means nothing.
    """
    from dataclasses import fields

    from effnet_quant.quantization.qat import QatConfig

    return QatConfig(**{field.name: getattr(parsed, field.name) for field in fields(QatConfig)})


def asked_spec(parsed: argparse.Namespace) -> QuantSpec | None:
    """The spec of ``--quant-spec``; None without it.

    Raises:
        UserError: unknown preset, or a file that can't be read.
    """
    given = getattr(parsed, "quant_spec", None)
    if given is None:
        return None
    return resolve_spec(_read_yaml(Path(given)) if Path(given).suffix in (".yml", ".yaml") else given)


def asked_overrides(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """Pattern and preset of every ``--quant-override``.

    Raises:
        UserError: one has another form.
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
