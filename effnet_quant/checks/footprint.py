"""Measures how long an engine takes to load, and how much memory it needs, in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from effnet_quant.errors import UserError

_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Footprint:
    """What a process needs that runs one engine.

    Attributes:
        load_seconds: from the call of ``load_engine`` to the first answer for one example. The import of the runtime and the
            compilation are within.
        peak_bytes: the largest resident memory of the process, Python and its libraries included.
    """

    load_seconds: float
    peak_bytes: int


def measure_footprint(path: Path, backend: str, precision: str | None, threads: int | None) -> Footprint:
    """Load an engine in a new Python process, and run one example.

    Raises:
        UserError: the engine can't be loaded or run.
    """
    package = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {package!r}); from effnet_quant.checks.footprint import main; main()"
    arguments = [str(path), backend, json.dumps(precision), json.dumps(threads)]
    command = [sys.executable, "-c", code, *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{backend} did not load {path} within {_LIMIT_SECONDS:.0f} s.") from error
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        said = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise UserError(said.removeprefix("effnet_quant.errors.UserError: "))
    return Footprint(**json.loads(lines[-1]))


def main() -> None:
    """What the new process does; its arguments are those of ``measure_footprint``."""
    from effnet_quant.engines.engine import load_engine

    path, backend, precision, threads = sys.argv[1:]
    start = time.perf_counter()
    engine = load_engine(path, backend, precision=json.loads(precision), threads=json.loads(threads))
    engine(*engine.example_inputs(1))
    seconds = time.perf_counter() - start
    print(json.dumps({"load_seconds": seconds, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """The peak of this process alone. getrusage counts the parent's memory at the fork too."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
