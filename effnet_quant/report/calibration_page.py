"""A page of plots of the calibrated ranges of all quantizers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.files import replace_file

FORMATS = (".png", ".pdf", ".svg")


def write_calibration_page(ranges: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one row for each quantizer: the range seen, the range chosen, the share of clipped values, and the SQNR.

    Args:
        ranges: ``RangeReport.to_json()`` of every quantizer.
        path: a .png, .pdf or .svg file.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a page of plots needs matplotlib: pip install 'effnet-quant[report]'.") from error
    rows = range(len(ranges))
    with mpl.rc_context({"svg.hashsalt": "effnet-quant"}):
        figure = Figure(figsize=(13, max(2.5, 0.17 * len(ranges))), layout="constrained")
        extents, clipped, noise = figure.subplots(1, 3, sharey=True, width_ratios=(3, 1, 1))
        for part, colour, height in (("seen", "#c8d4e3", 0.8), ("chosen", "#2a6f97", 0.35)):
            starts = [entry[part][0] for entry in ranges]
            widths = [entry[part][1] - entry[part][0] for entry in ranges]
            extents.barh(rows, widths, height, starts, color=colour, label=part)
        reach = [max(map(abs, entry["chosen"])) for entry in ranges]
        smallest = max(min(reach), 1e-3 * max(reach)) or 1.0
        # a power of ten, because the ticks are: one within the linear part would stand on zero's label
        extents.set_xscale("symlog", linthresh=10 ** math.ceil(math.log10(smallest)))
        extents.set_title("range", loc="left")
        extents.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False
        )  # beside the title, over no row
        clipped.barh(rows, [100 * (entry["clipped"] or 0) for entry in ranges], color="#b5543c")
        clipped.set_title("clipped, %")
        noise.barh(rows, [entry["sqnr"] or 0 for entry in ranges], color="#5b8c5a")
        noise.set_title("SQNR, dB")
        extents.set_yticks(list(rows), [entry["name"] for entry in ranges], fontsize=6)
        extents.set_ylim(len(ranges) - 0.5, -0.5)  # the first layer on top
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], dpi=100)
    replace_file(path, content.getvalue())
