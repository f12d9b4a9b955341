"""Checkpoints: what a run needs to go on as if it had never stopped."""

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
_HALF_WRITTEN_SECONDS = 3600  # a younger file may be another run's, which is writing it


def save_checkpoint(
    state: dict[str, Any], workspace: Path, filename: str, *, is_best: bool = False, gather: int = 0
) -> None:
    """Write a checkpoint, and copies as the best and the epoch's own where asked for; each file whole or not at all.

    Args:
        state: tensors and plain values.
        workspace: the folder.
        filename: of the latest checkpoint.
        is_best: also write ``model_best.pth.tar``.
        gather: keep that many epochs' checkpoints as ``checkpoint_<epoch>.pth.tar``, counted from 0 as NVIDIA's
            scripts do; -1 keeps all.

    Raises:
        UserError: a file can't be written; the previous ones are intact.
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
    if gather > 0:  # later epochs' are of another run that used this workspace
        for old in workspace.glob("checkpoint_[0-9]*.pth.tar"):
            number = old.name.removeprefix("checkpoint_").removesuffix(".pth.tar")
            if number.isdigit() and int(number) < state["epoch"] - gather:
                old.unlink()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of NVIDIA's scripts, executing nothing in it.

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
    """Create the folder that a run writes to, make sure it can be written, and clear what a killed run left half-written.

    Raises:
        UserError: it can't.
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
