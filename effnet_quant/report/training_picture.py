"""One picture of a training: its curves, the accuracy of each class, and which classes are taken for which."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.terminal import printable

_MOST_NAMED = 40  # classes; more have no room for their names
_MOST_NUMBERED = 20  # classes; the cells of more are too small for numbers
_LONGEST_NAME = 18


def check_pictures() -> None:
    """Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("pictures need matplotlib; pip install effnet-quant[report].") from error


def draw_training(
    path: Path,
    title: str,
    losses: Sequence[float | None],
    scores: Sequence[float | None],
    best_epoch: int,
    classes: Sequence[str],
    confusion: NDArray[np.int64],
) -> None:
    """Draw a training to a PNG file.

    Args:
        path: the file.
        title: above the picture.
        losses: mean training loss of each epoch; None for one that is not known.
        scores: top-1 of the validation images after each epoch, in percent; None as above.
        best_epoch: the epoch with the best score, counted from 1.
        classes: the names of the classes.
        confusion: int64 (classes, classes): images of the row's class that were taken for the column's.

    Raises:
        UserError: matplotlib is not installed, or the file can't be written.
    """
    check_pictures()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(classes)
    names = [_drawable(name, index) for index, name in enumerate(classes)] if count <= _MOST_NAMED else []
    side = min(max(4.5, 0.32 * count), 11.0)
    figure, (curves, bars, matrix) = plt.subplots(
        1, 3, figsize=(9.5 + side, side + 0.8), width_ratios=(5, 3.2, side), layout="constrained"
    )
    epochs = range(1, len(losses) + 1)
    curves.plot(epochs, _numbers(losses), color="#8a8f98", label="training loss")
    curves.set_xlabel("epoch")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_ylabel("training loss")
    curves.set_ylim(bottom=0)
    accuracy = curves.twinx()
    accuracy.plot(epochs, _numbers(scores), color="#4d7a00", label="validation top-1 (%)")
    accuracy.axvline(best_epoch, color="#4d7a00", linestyle=":", label=f"best epoch, {best_epoch}")
    accuracy.set_ylabel("validation top-1 (%)")
    accuracy.set_ylim(0, 100)
    lines = [*curves.get_legend_handles_labels()[0], *accuracy.get_legend_handles_labels()[0]]
    curves.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)

    totals = confusion.sum(1)
    shares = 100 * confusion.diagonal() / np.maximum(totals, 1)
    drawn = bars.barh(range(count), shares, color="#76b900")
    if names:
        bars.bar_label(
            drawn, [f"{share:.0f}" if total else "-" for share, total in zip(shares, totals, strict=True)], padding=2
        )
    bars.set_yticks(range(len(names)), names, fontsize=9)
    bars.set_xlim(0, 112)
    bars.set_xticks(range(0, 101, 25))
    bars.set_ylim(count - 0.5, -0.5)
    bars.set_xlabel("top-1 of each class (%)")
    bars.spines[["top", "right"]].set_visible(False)

    rows = confusion / np.maximum(totals, 1)[:, None]
    matrix.imshow(rows, cmap="Greens", vmin=0, vmax=1, aspect="equal")
    matrix.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
    matrix.set_yticks(range(len(names)), names, fontsize=9)
    matrix.set_xlabel("taken for")
    matrix.set_ylabel("class")
    matrix.set_title("validation images", fontsize=10)
    if count <= _MOST_NUMBERED:
        for row, column in zip(*confusion.nonzero(), strict=True):
            colour = "white" if rows[row, column] > 0.5 else "black"
            matrix.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=8, color=colour)
    figure.suptitle(title, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    replace_file(path, picture.getvalue())


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _drawable(name: str, index: int) -> str:
    """The name of a class, or its number where the picture's font lacks a letter of it."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))  # matplotlib's own
    return _short(name) if all(map(font.get_char_index, map(ord, printable(name)))) else f"class {index}"


def _short(name: str) -> str:
    # a dollar sign would start a formula
    shown = printable(name).replace("$", r"\$")
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"
