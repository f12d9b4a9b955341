"""Compares variants of one network: accuracy, speed, size, and agreement with PyTorch."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.tasks.task import Score


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        variant: its name.
        score: the task's score on the test images, in the score's unit. An engine has its own, not the simulation's.
        latency_ms: median milliseconds of a batch of 1.
        images_per_s: images a second at the median time of a batch of 32.
        size_bytes: of its file.
        agreement: for engines, percent of the test images on which it agrees with its PyTorch model.
    """

    variant: str
    score: float
    latency_ms: float
    images_per_s: float
    size_bytes: int
    agreement: float | None = None


def write_summary(rows: Sequence[Row], path: Path, score: Score = CLASSIFICATION.score) -> None:
    """Write the rows as a JSON list of objects. The score has the key ``score.key``; a missing agreement is left out."""
    values = [
        {score.key if name == "score" else name: value for name, value in asdict(row).items() if value is not None}
        for row in rows
    ]
    replace_file(path, (json.dumps(values, indent=2) + "\n").encode())


def format_table(rows: Sequence[Row], score: Score = CLASSIFICATION.score) -> str:
    """The rows as a table in plain text."""
    header = ("variant", f"{score.title} {score.unit}", "ms, batch 1", "img/s, batch 32", "size MB", "agreement %")
    cells = [
        (
            row.variant,
            f"{row.score:.2f}",
            f"{row.latency_ms:.2f}",
            f"{row.images_per_s:.0f}",
            f"{row.size_bytes / 1e6:.2f}",
            "" if row.agreement is None else f"{row.agreement:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]

    def line(values: Sequence[str]) -> str:
        first, *others = (value.ljust if column == 0 else value.rjust for column, value in enumerate(values))
        return "  ".join(
            [first(widths[0]), *(justify(width) for justify, width in zip(others, widths[1:], strict=True))]
        )

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def draw_summary(rows: Sequence[Row], path: Path, title: str, score: Score = CLASSIFICATION.score) -> None:
    """Draw the rows as bars, one panel each for score, throughput and size, to a PNG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib; pip install effnet-quant[report].") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        (f"{score.title} ({score.unit})", [row.score for row in rows], "{:.1f}"),
        ("images/s, batch 32", [row.images_per_s for row in rows], "{:.0f}"),
        ("file size (MB)", [row.size_bytes / 1e6 for row in rows], "{:.1f}"),
    )
    names = [row.variant for row in rows]
    colours = ["#76b900" if "INT8" in name else "#b7d98c" if "simulated" in name else "#8a8f98" for name in names]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 0.45 * len(rows) + 1.2), sharey=True, layout="constrained")
    for axis, (label, values, style) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [style.format(value) for value in values], padding=3, fontsize=9)
        axis.set_xlabel(label)
        axis.set_xlim(0, max(values) * 1.22)
        if axis is axes[0] and score.unit == "%":
            axis.set_xticks(range(0, 101, 25))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    replace_file(path, picture.getvalue())
