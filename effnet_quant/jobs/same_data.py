"""Whether a run resumes on the data that it began with."""

from __future__ import annotations

import sys
from typing import Any

from effnet_quant.card import ModelCard
from effnet_quant.errors import UserError


def check_same_classes(
    checkpoint: dict[str, Any] | None, source: str, classes: list[str], data: str, *, evaluate: bool
) -> None:
    """Check that the data has the checkpoint's classes, in the same order. An evaluation is only told.

    Without a checkpoint there is nothing to check. Checkpoints of NVIDIA's scripts name no classes.

    Raises:
        UserError: a training has other classes.
    """
    said = {} if checkpoint is None else checkpoint.get("metadata") or {}
    began = ModelCard.from_json(said, source).classes
    if not began or list(began) == list(classes):
        return
    lost, new = sorted(set(began) - set(classes)), sorted(set(classes) - set(began))
    differences = [f"{what} {_listed(names)}" for what, names in (("lacks", lost), ("adds", new)) if names]
    how = " and ".join(differences) or "has them in another order"
    if not evaluate:
        raise UserError(
            f"{data} has other classes than {source}: it {how}; resume on the data that the run began with, or start from "
            "the file with --pretrained-from-file."
        )
    if len(began) == len(classes):
        print(f"note: {data} has other classes than {source}: it {how}. They count by their order.", file=sys.stderr)


def say_other_images(checkpoint: dict[str, Any] | None, source: str, now: dict[str, Any], data: str) -> None:
    """Print a note if a run resumes on other training images of the same classes."""
    began = None if checkpoint is None else checkpoint.get("data")
    if isinstance(began, dict) and began != now:
        print(
            f"note: {data} has other training images than {source} began with ({began.get('images')} then, "
            f"{now['images']} now), so the run is not the one that it would have been.",
            file=sys.stderr,
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
