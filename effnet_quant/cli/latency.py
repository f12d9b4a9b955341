"""effnet-quant latency: time engines in turns on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.engines import usual_backend
from effnet_quant.cli.process import run
from effnet_quant.engines.runtimes import BACKENDS, get_backend
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, possible_path, replace_file
from effnet_quant.terminal import printable

if TYPE_CHECKING:
    from effnet_quant.checks.latency import Latency
    from effnet_quant.engines.engine import Engine

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # as in NVIDIA's tables
# FILE, FILE@BACKEND or FILE@BACKEND@PRECISION; FILE may contain an @
_ENGINE = re.compile(rf"(.*?)(?:@({'|'.join(BACKENDS)})(?:@(\w+))?)?", re.DOTALL)
_TITLES = ("engine", "backend", "precision", "batch", "img/s", "avg ms", "50 % ms", "95 % ms", "99 % ms", "speed")


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Time engines in turns, and print a table; the last column is the speed over the first engine's.")
    add = parser.add_argument
    add(
        "engines",
        nargs="+",
        metavar="ENGINE",
        help="FILE, FILE@BACKEND or FILE@BACKEND@PRECISION, e.g. int8.onnx@openvino@bf16; weights run in torch",
    )
    add("-b", "--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="N", help="batch sizes to measure")
    add("--device", choices=("cpu", "cuda"), help="device, if the backend has several (default: its usual one)")
    add("--threads", type=int, help="threads of engines on the CPU (default: each runtime's own choice)")
    add("--image-size", type=int, help="image size in pixels, for engines with an open size")
    add("--seconds", type=float, default=5, help="approximate time per engine and batch size")
    add("--json", metavar="FILE", help="also write the figures to FILE, in seconds")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Measure as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    if min(parsed.batch_sizes) < 1 or parsed.seconds <= 0:
        raise UserError("--batch-sizes and --seconds must be positive.")
    if parsed.json:
        check_writable(Path(parsed.json))
    from effnet_quant.checks.engines_machine import describe_engines_machine, machine_line
    from effnet_quant.checks.latency import measure_engines

    engines = [_load(text, parsed.device, parsed.threads) for text in parsed.engines]
    if parsed.image_size is not None and not any(None in engine.input.shape for engine in engines):
        raise UserError("these engines take images of one size; leave --image-size out.")
    machine = describe_engines_machine(parsed.threads)
    print(f"{machine_line(machine)}\n")
    columns = [[printable(engine.path.name), engine.backend, engine.precision] for engine in engines]
    widths = [max(map(len, column)) for column in zip(_TITLES, *columns, strict=False)]
    print(_line(_TITLES, widths))
    print(_line(["-" * len(title) for title in _TITLES], widths), flush=True)
    rows = []
    for latencies in measure_engines(engines, parsed.batch_sizes, parsed.seconds, parsed.image_size):
        for engine, latency in zip(engines, latencies, strict=True):
            print(_line(_cells(engine, latency, latencies[0]), widths), flush=True)
            rows.append(_record(engine, latency, latencies[0]))
    if parsed.json:
        content = json.dumps({"machine": machine, "rows": rows}, indent=1)
        replace_file(Path(parsed.json), content.encode())
    return 0


def _load(text: str, device: str | None, threads: int | None) -> Engine:
    from effnet_quant.engines.engine import load_engine

    path, backend, precision = _ENGINE.fullmatch(text).groups()  # type: ignore[union-attr]  # any text matches
    if backend is None and "@" in path and not possible_path(path).is_file():
        raise UserError(f"there is no file {path}; a backend after the @ is one of: {', '.join(BACKENDS)}.")
    backend = backend or usual_backend(path)
    devices = get_backend(backend).DEVICES
    if len(devices) == 1:
        device = None
    on_cpu = (device or devices[0]) == "cpu"
    return load_engine(path, backend, device=device, precision=precision, threads=threads if on_cpu else None)


def _cells(engine: Engine, latency: Latency, first: Latency) -> list[str]:
    times = (latency.average, latency.p50, latency.p95, latency.p99)
    return [
        printable(engine.path.name),
        engine.backend,
        engine.precision,
        str(latency.batch_size),
        f"{latency.throughput:.0f}",
        *(f"{1e3 * seconds:.2f}" for seconds in times),
        _times(first.p50 / latency.p50),
    ]


def _times(ratio: float) -> str:
    """A ratio with two decimals; a small one with two digits, so that it never reads 0.00x."""
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a markdown table. The first cells are left-aligned to ``widths``; the others are right-aligned numbers."""
    words = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)]
    padded = [*words, *(f"{cell:>8}" for cell in cells[len(widths) :])]
    return f"| {' | '.join(padded)} |"


def _record(engine: Engine, latency: Latency, first: Latency) -> dict[str, Any]:
    return {
        "engine": str(engine.path),
        "backend": engine.backend,
        "device": engine.settings.device,
        "precision": engine.precision,
        **asdict(latency),
        "throughput": latency.throughput,
        "speed_over_first": first.p50 / latency.p50,
    }


def main() -> None:
    """Entry point of ``effnet-quant latency``."""
    run(job)
