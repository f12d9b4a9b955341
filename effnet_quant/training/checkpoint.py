"""Writes and reads checkpoints, from which a run resumes as if it had never stopped."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effnet_quant
from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.models.weights import read_torch_file

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
        UserError: the file is missing, damaged, refused, or no checkpoint.
    """
    state = read_torch_file(path)
    if not isinstance(state, dict) or "state_dict" not in state or "epoch" not in state:
        raise UserError(
            f"{path} is no checkpoint (it has no 'state_dict' and 'epoch'); "
            "start from plain weights with --pretrained-from-file instead of --resume."
        )
    weights = state["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} is no checkpoint (its 'state_dict' holds other things than tensors); get it again.")
    return state


def prepare_workspace(path: str | Path) -> Path:
    """Create a run's folder, check that it can be written to, and delete half-written files of killed runs.

    Raises:
        UserError: the folder can't be created or written to.
    """
    workspace = Path(path)
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
