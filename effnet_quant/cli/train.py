"""effnet-quant train: main.py with the preset's settings in place of NVIDIA's defaults."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_quant.cli import main as main_script
from effnet_quant.cli.arguments import Parser, add_training_arguments
from effnet_quant.cli.process import run, typed_command
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable, shell_word

if TYPE_CHECKING:
    from effnet_quant.card import ModelCard

NVIDIA, PRESET = "nvidia", "preset"
# values of flags for which the preset has others than main.py
_CHOSEN = frozenset(
    (
        "arch",
        "image_size",
        "smallest_crop",
        "epochs",
        "batch_size",
        "lr",
        "lr_schedule",
        "warmup",
        "label_smoothing",
        "weight_decay",
        "nesterov",
        "mixup",
        "amp",
        "amp_dtype",
        "memory_format",
        "workers",
        "workspace",
        "pretrained",
        "seed",
    )
)
_DEFAULT = r" \(default: [^)]*\)$"
_RUN_CONTROL = {"print_freq", "checkpoint_filename", "save_checkpoints", "training_only", "prof", "run_epochs", "topk"}


def build_parser() -> Parser:
    """The verb's flags: main.py's, and whose defaults they have."""
    parser = Parser(
        "Train an image classifier. Data and machine choose the settings that no flag gives (docs/training.md)."
    )
    add_training_arguments(parser)
    for action in parser._actions:
        if action.dest in _CHOSEN:
            action.help = f"{re.sub(_DEFAULT, '', action.help or '')} (default: chosen)"
    parser.add_argument(
        "--defaults",
        choices=(PRESET, NVIDIA),
        default=PRESET,
        help="where settings come from that no flag gives (default: preset; nvidia: as in main.py)",
    )
    return parser


def job(arguments: Sequence[str]) -> int:
    """Train as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.run_file import write_run_file
    from effnet_quant.cli.training import settings, train_or_evaluate
    from effnet_quant.data.arrays import SYNTHETIC
    from effnet_quant.jobs.run import open_run
    from effnet_quant.jobs.training_result import PICTURE, write_result
    from effnet_quant.training.checkpoint import BEST_FILENAME

    # nothing is chosen for an evaluation or a measurement of speed
    plain = parsed.evaluate or parsed.prof > 0 or SYNTHETIC in (parsed.data, parsed.data_backend)
    if parsed.defaults == NVIDIA or plain:
        return main_script.train(parsed)
    if "RANK" in os.environ:
        raise UserError(
            "the preset trains in one process; start main.py with multiproc.py, or give train --defaults nvidia."
        )
    if "epochs" in parsed.explicit and parsed.epochs < 1:
        raise UserError(f"--epochs must be 1 or more, not {parsed.epochs}; leave it out for as many as the data needs.")
    said = card_to_start_from(parsed)
    chosen = _take_preset(parsed, said)
    main_script.refuse_quantized(parsed.arch)
    asked = settings(parsed, said)
    with open_run(asked.card, asked.data, asked.config, asked.place, asked.start) as ready:
        write_run_file(ready, parsed, "train", chosen)
        print(f"folder: {printable(parsed.workspace)}", flush=True)
        status = train_or_evaluate(ready, parsed)
        best = Path(parsed.workspace, BEST_FILENAME)
        if status != 0 or parsed.run_epochs >= 0 or not parsed.save_checkpoints or not best.is_file():
            return status  # there is more to train, or nothing was kept
        result = write_result(ready, asked.place)
    print(result)
    picture = Path(parsed.workspace, PICTURE)
    if picture.is_file():
        print(f"picture: {printable(str(picture))}")
    program = typed_command().rpartition(" ")[0]
    print(f"next: {program} quantize {shell_word(parsed.workspace)}", flush=True)
    return 0


def _take_preset(parsed: argparse.Namespace, said: ModelCard) -> set[str]:
    """Set the flags that the user did not give: to the preset's values, or to those of the run that is resumed.

    Returns:
        The names of what was set.
    """
    from effnet_quant.jobs.float_training import new_run_folder
    from effnet_quant.jobs.preset import choose_preset, chosen

    named = parsed.arch if "arch" in parsed.explicit or said.arch else None
    starts = parsed.resume or parsed.pretrained_from_file
    preset = choose_preset(parsed.data, named, said if starts else None)
    values: dict[str, Any] = preset.values() | {"data_backend": "pytorch", "workspace": new_run_folder}
    if "optimizer" in parsed.explicit and parsed.optimizer != "sgd":
        values.pop("nesterov")
    if "epochs" in parsed.explicit:
        values["warmup"] = min(values["warmup"], parsed.epochs // 4)
    if parsed.resume:
        values |= _of_the_resumed_run(parsed.resume, values) | {"workspace": os.path.dirname(parsed.resume) or "."}
    else:
        for sentence in preset.said:
            print(printable(sentence))
    flags = values.keys() & vars(parsed).keys() - parsed.explicit
    for name in values.keys() - parsed.explicit:
        setattr(parsed, name, values[name]() if callable(values[name]) else values[name])
    parsed.explicit |= {"data_backend"}
    print(printable(chosen(vars(parsed))), flush=True)
    return flags


def _of_the_resumed_run(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters in a checkpoint, where they have the type that the preset's have."""
    from effnet_quant.training.checkpoint import load_checkpoint

    config = load_checkpoint(path).get("config") or {}
    found = {name: config[name] for name in values.keys() & config.keys() - _RUN_CONTROL}
    if "channels_last" in config:
        found["memory_format"] = "nhwc" if config["channels_last"] is True else "nchw"
    wrong = [name for name, value in found.items() if not _same_type(value, values[name])]
    if wrong:
        raise UserError(f"{path} can't be used: its setting '{min(wrong)}' is not what it must be; get it again.")
    print(f"from {path}: {found.get('epochs')} epochs, and the other settings of its run", file=sys.stderr)
    return found


def _same_type(value: Any, own: Any) -> bool:
    kinds = [float if type(one) is int else type(one) for one in (value, own)]
    return value is None or own is None or kinds[0] is kinds[1]


def main() -> None:
    """Entry point of ``effnet-quant train``."""
    run(job)
