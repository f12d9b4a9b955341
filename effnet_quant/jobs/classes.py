"""The classes of a run: those of its data, in the order of the weights that the run starts from."""

from __future__ import annotations

import sys
from pathlib import Path

from effnet_quant.card import ModelCard
from effnet_quant.data.data_argument import is_split, is_undivided
from effnet_quant.data.folders import class_folders
from effnet_quant.errors import UserError
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.weights import Weights, other_class_count


def label_order(data: str, said: ModelCard, *, evaluate: bool) -> list[str] | None:
    """The weights' classes, if the labels of ``data`` must count these; None if the data's own order holds.

    A data set in folders may have the classes in another order, or in an evaluation only some of them.

    Args:
        data: the DATA argument. Only folders of classes have an order of their own.
        said: the weights' card.
        evaluate: whether the images are only evaluated.
    """
    folder = Path(data, "val" if evaluate and not Path(data, "train").is_dir() else "train")
    if said.classes is None:
        return None
    if is_undivided(data):
        folder = Path(data)
    elif not folder.is_dir() or not is_split(data, folder.name):
        return None
    try:
        found = class_folders(folder)
    except UserError:  # opening the data says what is wrong with it
        return None
    same = set(found) <= set(said.classes) if evaluate else set(found) == set(said.classes)
    if not same and len(found) == len(said.classes):
        print(
            f"note: the classes of {folder} have other names than the weights' ({found[0]}, not {said.classes[0]} …); they "
            "are taken in the same order.",
            file=sys.stderr,
        )
    return list(said.classes) if same and found else None


def check_count(asked: int | None, classes: list[str], data: str) -> None:
    """Raises UserError if another number of classes is asked for than ``data`` has; None asks for none."""
    if asked not in (None, len(classes)):
        raise UserError(
            f"{data} has {len(classes)} classes, but the model has {asked}; pass --num-classes {len(classes)}."
        )


def check_classes(weights: Weights, entry: ModelEntry, classes: list[str], data: str) -> None:
    """Check that data of these classes fits the classifier of ``weights``.

    Raises:
        UserError: the weights are for another number of classes.
    """
    own = len(classes)
    count = weights.card.num_classes or other_class_count(entry.shapes(own), weights) or own
    if count != own:
        raise UserError(
            f"{weights.source} has {count} classes, but {data} has {own}; give data of these classes, or train a "
            "new classifier with main.py."
        )
