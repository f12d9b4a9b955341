"""The table of variants, by the task's score."""

import json
from pathlib import Path

from effnet_quant.report.summary import Row, draw_summary, format_table, write_summary
from effnet_quant.tasks.task import Score

ROWS = [Row("FP32", 98.611, 12.344, 161.7, 16_374_000), Row("INT8 engine", 98.05, 1.5, 2000.0, 4_400_000, 99.444)]
PSNR = Score("psnr", "PSNR", "dB")


def test_the_score_stands_under_the_tasks_words(tmp_path: Path) -> None:
    assert format_table(ROWS).splitlines() == [
        "variant      top-1 %  ms, batch 1  img/s, batch 32  size MB  agreement %",
        "-----------  -------  -----------  ---------------  -------  -----------",
        "FP32           98.61        12.34              162    16.37             ",
        "INT8 engine    98.05         1.50             2000     4.40        99.44",
    ]
    assert format_table(ROWS, PSNR).splitlines()[0].split()[1:3] == ["PSNR", "dB"]
    write_summary(ROWS, tmp_path / "summary.json")
    first, second = json.loads((tmp_path / "summary.json").read_text())
    assert list(first) == ["variant", "top1", "latency_ms", "images_per_s", "size_bytes"]
    assert (first["top1"], second["agreement"]) == (98.611, 99.444)
    write_summary(ROWS, tmp_path / "summary.json", PSNR)
    assert [row["psnr"] for row in json.loads((tmp_path / "summary.json").read_text())] == [98.611, 98.05]


def test_the_picture_takes_any_score(tmp_path: Path) -> None:
    draw_summary(ROWS, tmp_path / "summary.png", "a network", PSNR)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
