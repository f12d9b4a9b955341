"""multiproc.py: run a script in several processes that train together, by torchrun's engine."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from effnet_quant.cli.process import LOST_PEER_STATUS, run, typed_command
from effnet_quant.errors import UserError
from effnet_quant.files import create_folder, possible_path

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

_CHECKPOINT_SECONDS = 600  # from a signal to the kill. The engine's 30 are too few for a long step and a slow disk
_LINES_SHOWN = 20


def job(arguments: Sequence[str]) -> int:
    """Start the processes as the command line says and wait for them; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    if not possible_path(parsed.training_script).is_file():
        raise UserError(f"there is no script {parsed.training_script}; check the path.")
    if parsed.nproc_per_node < 1:
        raise UserError(f"--nproc_per_node must be at least 1, not {parsed.nproc_per_node}.")
    if parsed.max_restarts < 0:
        raise UserError(f"--max_restarts must be 0 or more, not {parsed.max_restarts}.")
    create_folder(Path(parsed.log_dir), "--log_dir")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # the engine logs each of its steps; the messages below are enough
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // parsed.nproc_per_node)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_CHECKPOINT_SECONDS))  # torch after 2.8 reads it
    # The engine's own store outlives a restart, and with it the addresses of processes that have ended. Which process
    # comes first then decides whether the restart works. Without that store each start has a new one.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    signal.signal(signal.SIGUSR1, _stop)  # the one signal that the engine leaves alone
    config = _launch_config(parsed)
    started = time.time()
    command = [sys.executable, "-u", parsed.training_script, *parsed.training_script_args]
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return _report(error.failures, Path(parsed.log_dir), config.run_id)
    except SignalException as error:
        # each process stops with a checkpoint; one that can't write it leaves an error file
        folders = Path(parsed.log_dir).glob(f"{glob.escape(config.run_id)}_*/attempt_*")
        attempts = [folder for folder in folders if folder.stat().st_mtime >= started]
        latest = max(attempts, key=lambda folder: folder.stat().st_mtime, default=None)
        return 2 if latest is not None and any(latest.glob("*/error.json")) else 128 + error.sigval
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=typed_command(),
        description="Run a script in several processes that train together. The output of process 0 is shown; that of the "
        "others goes to files. If one process dies, all end.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nnodes", default="1", help="number of machines, or MIN:MAX with --rdzv_backend c10d")
    add("--node_rank", "--node-rank", type=int, default=0, help="number of this machine")
    add("--nproc_per_node", "--nproc-per-node", type=int, default=1, help="processes on this machine, one for each GPU")
    add("--master_addr", "--master-addr", default="127.0.0.1", help="address of machine 0")
    add("--master_port", "--master-port", type=int, default=29500, help="a free port of machine 0")
    add(
        "--rdzv_backend",
        "--rdzv-backend",
        choices=("c10d", "etcd", "etcd-v2", "static"),
        help="how machines find each other, in place of --master_addr and --master_port",
    )
    add("--rdzv_conf", "--rdzv-conf", default="", help="settings of --rdzv_backend, as KEY=VALUE,KEY=VALUE")
    add("--rdzv_endpoint", "--rdzv-endpoint", default="", help="HOST:PORT where machines meet")
    add("--rdzv_id", "--rdzv-id", help="name of the job, the same on all machines")
    add("--max_restarts", "--max-restarts", type=int, default=0, help="how often to restart after a process died")
    add("--log_dir", "--log-dir", default="multiproc_logs", help="folder for the output of processes other than 0")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("training_script", help="main.py, quant_main.py or launch.py")
    add("training_script_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _launch_config(parsed: argparse.Namespace) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    least, _, most = parsed.nnodes.partition(":")
    try:
        nodes = int(least), int(most or least)
    except ValueError:
        raise UserError(f"--nnodes is a number or MIN:MAX, not '{parsed.nnodes}'.") from None
    if not 1 <= nodes[0] <= nodes[1]:
        raise UserError(f"--nnodes is at least 1, and MIN not above MAX; {parsed.nnodes} is not.")
    if parsed.rdzv_backend:
        meeting = {"rdzv_backend": parsed.rdzv_backend, "rdzv_endpoint": parsed.rdzv_endpoint}
        pairs = [pair.partition("=") for pair in parsed.rdzv_conf.split(",") if pair]
        if not all(name and separator for name, separator, _ in pairs):
            raise UserError(f"--rdzv_conf is KEY=VALUE,KEY=VALUE, not '{parsed.rdzv_conf}'.")
        configs: dict[str, object] = {name.strip(): value.strip() for name, _, value in pairs}
    elif nodes == (1, 1):
        meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}  # any free port
        configs = {}
    else:
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": f"{parsed.master_addr}:{parsed.master_port}"}
        configs = {"rank": parsed.node_rank}
    # only machine 0 shows its first process
    shown = {0: Std.NONE} if parsed.node_rank == 0 else {}
    redirects = {rank: shown.get(rank, Std.ALL) for rank in range(parsed.nproc_per_node)}
    return LaunchConfig(
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        nproc_per_node=parsed.nproc_per_node,
        run_id=parsed.rdzv_id or ("effnet_quant" if nodes != (1, 1) else uuid.uuid4().hex[:8]),
        rdzv_configs=configs,
        max_restarts=parsed.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=parsed.log_dir, redirects=redirects),
        **meeting,
    )


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal by the exception that makes the engine pass it on to the processes and wait for their end."""
    from torch.distributed.elastic.multiprocessing import SignalException

    raise SignalException(f"got signal {number}", signal.Signals(number))


def _report(failures: dict[int, ProcessFailure], log_dir: Path, run_id: str) -> int:
    """Show why the job ended: the error of the process that failed first. Returns its exit status."""
    rank, failure = min(failures.items(), key=lambda item: (_is_consequence(item[1]), item[1].timestamp))
    status = 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {status}"
    print(f"process {rank} {how}; the job has ended", file=sys.stderr)
    logs = log_dir.glob(f"{run_id}_*/attempt_*/{failure.local_rank}/stderr.log")
    latest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if latest is not None:
        print(f"its last lines, from {latest}:", file=sys.stderr)
        for line in latest.read_text(errors="replace").splitlines()[-_LINES_SHOWN:]:
            print(f"  {line}", file=sys.stderr)
    return status


def _is_consequence(failure: ProcessFailure) -> bool:
    """Whether a process ended because another one had: by a lost connection, or by the engine's SIGTERM."""
    return failure.exitcode in (LOST_PEER_STATUS, -15, 143)


def main() -> None:
    """Entry point of the script."""
    run(job)
