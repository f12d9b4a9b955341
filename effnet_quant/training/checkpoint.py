"""Writes and reads checkpoints, from which a run resumes as if it had never stopped."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effnet_quant
from effnet_quant.errors import UserError
from effnet_quant.files import possible_path, replace_file
from effnet_quant.models.foreign_tensors import check_tensors
from effnet_quant.models.weights import EMA_KEY, read_torch_file

BEST_FILENAME = "model_best.pth.tar"
_HALF_WRITTEN_SECONDS = 3600  # a younger file may still be written by another run


def save_checkpoint(
    state: dict[str, Any], workspace: Path, filename: str, *, is_best: bool = False, gather: int = 0
) -> None:
    """Write a checkpoint and, where asked for, copies as the best and as the epoch's own. Each file is replaced atomically.

    Args:
        state: tensors and plain values.
        workspace: the folder.
        filename: name of the latest checkpoint.
        is_best: also write ``model_best.pth.tar``.
        gather: how many epochs to keep as ``checkpoint_<epoch>.pth.tar``; -1 keeps all. Epochs count from 0, as in
            NVIDIA's scripts.

    Raises:
        UserError: a file can't be written. The previous files are intact.
    """
    buffer = io.BytesIO()
    versions = {"effnet_quant": effnet_quant.__version__, "torch": str(torch.__version__)}
    torch.save({**state, "versions": versions}, buffer)
    content = buffer.getvalue()
    replace_file(workspace / filename, content)
    if is_best:
        replace_file(workspace / BEST_FILENAME, content)
    if gather != 0:
        replace_file(workspace / f"checkpoint_{state['epoch'] - 1:04d}.pth.tar", content)
    if gather > 0:  # files of later epochs belong to another run in this workspace
        for old in workspace.glob("checkpoint_[0-9]*.pth.tar"):
            number = old.name.removeprefix("checkpoint_").removesuffix(".pth.tar")
            if number.isdigit() and int(number) < state["epoch"] - gather:
                old.unlink()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of NVIDIA's scripts, without executing anything in it.

    Raises:
        UserError: the file is missing, damaged, refused, or no checkpoint, or an entry is not what it must be.
    """
    state = read_torch_file(path)
    if not isinstance(state, dict) or state.get("state_dict") is None or state.get("epoch") is None:
        raise UserError(
            f"{path} is no checkpoint (it has no 'state_dict' and 'epoch'); "
            "start from plain weights with --pretrained-from-file instead of --resume."
        )
    for name, (is_right, expected) in _ENTRIES.items():
        if state.get(name) is not None and not is_right(state[name]):
            raise UserError(f"{path} can't be used: its entry '{name}' is not {expected}; get it again.")
    for name in _STATE_DICTS:
        if name in state:
            check_tensors(state[name], str(path))
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_score(value: Any) -> bool:
    if isinstance(value, Tensor):  # as some of NVIDIA's checkpoints have it
        return value.numel() == 1 and not value.is_complex() and not bool(value.isnan())
    return isinstance(value, Real) and not math.isnan(value)


def _are_random_states(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(state, Tensor) for state in value):
        return False
    return all(state.dtype == torch.uint8 and state.dim() == 1 for state in value)


def _is_identity(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("images")) and isinstance(value.get("digest"), str)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_right(value[name]) for name, is_right in _CONFIG.items() if value.get(name) is not None
    )


def _are_sums(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == (2,) and value.dtype == torch.float64 and _is_finite(value)


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


_MOST = 2**62  # epochs, batches, steps and processes
_STATE_DICTS = ("state_dict", EMA_KEY)
# entries of "config" that a resumed run reads
_CONFIG: dict[str, Callable[[Any], bool]] = {
    "batch_size": _is_count,
    "optimizer_batch_size": lambda value: value == -1 or _is_count(value),
    "workers": _is_count,
    "seed": _is_count,
}
# what the entries of a checkpoint must be, where it has them: the rule, and how a sentence names it
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (_is_count, "a number of epochs"),
    "batch": (_is_count, "a number of batches"),
    "step": (_is_count, "a number of steps"),
    "epochs_since_best": (_is_count, "a number of epochs"),
    "best_prec1": (_is_score, "a score"),
    "processes": (lambda value: _is_count(value) and value > 0, "a number of processes"),
    "optimizer": (lambda value: isinstance(value, dict), "an optimizer's state"),
    "scaler": (lambda value: isinstance(value, dict), "a loss scaler's state"),
    "loss_sums": (_are_sums, "two sums"),
    "rng": (_are_random_states, "a list of random states"),
    "cuda_rng": (_are_random_states, "a list of random states"),
    "config": (_is_config, "a configuration"),
    "data": (_is_identity, "a count of images and their digest"),
}


def prepare_workspace(path: str | Path) -> Path:
    """Create a run's folder, check that it can be written to, and delete half-written files of killed runs.

    Raises:
        UserError: the folder can't be created or written to.
    """
    workspace = possible_path(path)
    probe = workspace / ".effnet_quant_probe"
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
        for half in workspace.glob(".*.pth.tar.*"):
            if time.time() - half.stat().st_mtime > _HALF_WRITTEN_SECONDS:
                half.unlink()
    except OSError as error:
        raise UserError(
            f"can't write to the workspace {workspace}: {error.strerror}; choose another folder with --workspace."
        ) from error
    return workspace
