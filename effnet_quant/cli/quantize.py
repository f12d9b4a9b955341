"""effnet-quant quantize: quant_main.py; or, for the folder of a training, the whole way to a verified INT8 engine."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli import quant_main
from effnet_quant.cli.process import run, typed_command
from effnet_quant.cli.verify import verdict
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable

_RECIPE = "standard"
_FOLDER = "quantized"  # in the training's folder
_CHECKPOINT, _BEST = "checkpoint.pth.tar", "model_best.pth.tar"
# flags that say themselves from what the quantization starts, or that it is none
_OTHERWISE = ("pretrained_from_file", "pretrained", "resume", "evaluate", "auto", "budget", "target_drop", "arch")


def job(arguments: Sequence[str]) -> int:
    """Quantize as the command line says; returns the exit status, 1 if the engine departs from its simulation."""
    parsed = quant_main.build_parser().parse(arguments)
    folder = Path(parsed.data)
    if not _is_training(folder):
        return quant_main.job(arguments)
    if given := [name for name in _OTHERWISE if name in parsed.explicit]:
        raise UserError(
            f"{folder} is the folder of a training, which is quantized from its best checkpoint; leave out "
            f"--{given[0].replace('_', '-')}, or give DATA."
        )
    target = parsed.target or "onnxruntime"
    if importlib.util.find_spec(target) is None:
        raise UserError(f"--target {target}: it is not installed here, and the engine is to be run; choose another.")
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
    return (folder / _CHECKPOINT).is_file() or (folder / "result.json").is_file()


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
    print(f"next: {program} classify --pretrained-from-file {printable(str(made.path))} --image photo.jpg", flush=True)
    return 0


def main() -> None:
    """Entry point of ``effnet-quant quantize``."""
    run(job)
