"""effnet-quant quantize: quant_main.py; or, for the folder of a training, the whole way to a verified INT8 engine."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli import quant_main
from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run, typed_command
from effnet_quant.cli.run_file import DATA, FILENAME
from effnet_quant.cli.verify import verdict
from effnet_quant.errors import UserError
from effnet_quant.recipes.bounded_yaml import read_yaml
from effnet_quant.terminal import printable, shell_word

_RECIPE = "standard"
_FOLDER = "quantized"  # in the training's folder
_RESULT = "result.json"
_CHECKPOINT, _BEST = "checkpoint.pth.tar", "model_best.pth.tar"
# flags that say themselves from what the quantization starts, or that it is none
_OTHERWISE = ("pretrained_from_file", "pretrained", "resume", "evaluate", "auto", "budget", "target_drop", "arch")


def build_parser() -> Parser:
    """quant_main.py's flags; DATA may be the folder of a training."""
    parser = quant_main.build_parser()
    parser.description = (
        "Make a verified INT8 engine from the folder of a training, without further flags. Or, given DATA and trained "
        "weights, do as quant_main.py: calibrate (--epochs 0 stops there), then fine-tune with fake quantization."
    )
    for action in parser._actions:
        if action.dest == DATA:
            action.help = f"the folder of a training (runs/...), or {action.help}"
    return parser


def job(arguments: Sequence[str]) -> int:
    """Quantize as the command line says; returns the exit status, 1 if the engine departs from its simulation."""
    parsed = build_parser().parse(arguments)
    folder = Path(parsed.data)
    if not _is_training(folder):
        if not parsed.explicit & {"pretrained_from_file", "pretrained", "resume"}:
            raise _no_run(folder)
        return quant_main.job(arguments)
    if given := [name for name in _OTHERWISE if name in parsed.explicit]:
        raise UserError(
            f"{folder} is the folder of a training, which is quantized from its best checkpoint; leave out "
            f"--{given[0].replace('_', '-')}, or give DATA."
        )
    target = parsed.target or "onnxruntime"
    if importlib.util.find_spec(target) is None:
        raise UserError(f"--target {target}: it is not installed here, and the engine is to be run; choose another.")
    if not (folder / _RESULT).is_file():
        raise _stopped_run(folder)
    from effnet_quant.jobs.training_result import read_result

    result = read_result(folder)
    if Path(result.data).is_absolute() and not Path(result.data).exists():
        raise UserError(
            f"the images of {folder} are no longer in {result.data}; put them there again, or give DATA and "
            f"--pretrained-from-file {folder / _BEST}."
        )
    workspace = Path(parsed.workspace) if "workspace" in parsed.explicit else folder / _FOLDER
    status = quant_main.job(_command(parsed, arguments, result.data, workspace, target))
    return status or _export(folder, workspace, result.data, target)


def _is_training(folder: Path) -> bool:
    """Whether a folder has what a training leaves, and no images."""
    if folder.suffix in (".tar",) or "://" in str(folder) or not folder.is_dir():
        return False
    return (folder / _CHECKPOINT).is_file() or (folder / _RESULT).is_file()


def _no_run(folder: Path) -> UserError:
    """Says that ``folder`` is no training's, and which one is near."""
    if folder.is_file() and _is_training(folder.parent):
        return UserError(f"{folder} is a file of a run; give its folder, {folder.parent}.")
    beside = folder if folder.is_dir() else folder.parent
    runs = sorted(filter(_is_training, beside.iterdir())) if beside.is_dir() else []
    if runs and beside == folder:
        return UserError(f"{folder} holds runs of effnet-quant train; name one, the last is {runs[-1]}.")
    if runs and not folder.exists():
        return UserError(f"there is nothing at {folder}; the last run is {runs[-1]}.")
    return UserError(
        f"{folder} is not the folder of a run of effnet-quant train; give such a folder, or trained weights with "
        "--pretrained-from-file, --pretrained or --resume."
    )


def _stopped_run(folder: Path) -> UserError:
    """Says how to finish a training that was stopped."""
    settings = read_yaml(str(folder / FILENAME)) if (folder / FILENAME).is_file() else None
    data = shell_word(settings[DATA]) if isinstance(settings, dict) and DATA in settings else "DATA"
    finish = f"{typed_command().rpartition(' ')[0]} train {data} --resume {shell_word(folder / _CHECKPOINT)}"
    return UserError(
        f"{folder} holds no {_RESULT}, which effnet-quant train writes at its end; finish the training with {finish}, or "
        "add --epochs 1 to that to end it as it is."
    )


def _command(
    parsed: argparse.Namespace, arguments: Sequence[str], data: str, workspace: Path, target: str
) -> list[str]:
    """quant_main.py's flags for the best checkpoint of a training; the user's flags come last and win."""
    place = list(arguments).index(parsed.data)
    others = [*arguments[:place], *arguments[place + 1 :]]
    usual = ["--pretrained-from-file", str(Path(parsed.data, _BEST)), "--workspace", str(workspace), "--overwrite"]
    usual += ["--target", target, "-b", "32", "-j", "0", "--seed", "0", "--data-backend", "pytorch"]
    if not parsed.explicit & {"epochs", "calibration_method", "percentile"}:
        usual += ["--epochs", "0"] + ([] if parsed.ptq else ["--ptq", _RECIPE])
    return [*usual, *others, "--", data] if "--" not in others else [*usual, *others, data]


def _export(folder: Path, workspace: Path, data: str, target: str) -> int:
    from effnet_quant.jobs.verified_engine import FLOAT, export_verified
    from effnet_quant.report.summary import format_table, write_summary

    best = workspace / _BEST
    made = export_verified(folder / _BEST, best if best.is_file() else workspace / _CHECKPOINT, data, folder, target)
    write_summary(made.rows, folder / "summary.json")
    comparison, (floating, integer) = made.comparison, made.rows
    low, high = comparison.interval
    print(f"\n{format_table(made.rows)}\n")
    print(
        f"{target} on this machine, {comparison.images} validation images; agreement: the same class as in PyTorch "
        f"(INT8: 95 % interval {low:.2f} to {high:.2f} %)."
    )
    if integer.latency_ms > floating.latency_ms and integer.images_per_s < floating.images_per_s:
        print(f"note: the INT8 engine is slower than the float one here; {printable(str(folder / FLOAT))} is better.")
    print(f"{printable(str(made.path))}: {verdict(comparison)}")
    if not comparison.agrees():
        return 1
    program = typed_command().rpartition(" ")[0]
    print(f"next: {program} classify --pretrained-from-file {shell_word(made.path)} --image photo.jpg", flush=True)
    return 0


def main() -> None:
    """Entry point of ``effnet-quant quantize``."""
    run(job)
