"""benchmarks/engine_latency.py and engine_graphs.py, in small."""

import sys
from pathlib import Path

import engine_graphs
import engine_latency
import pytest

from effnet_quant.engines.cpu import cpu_has_bf16, cpu_has_exact_int8

OURS = ["ours INT8, ORT", "ours INT8, OpenVINO"]


@pytest.mark.slow  # two quantization tools beside ours: about a minute
def test_the_table_has_every_engine_and_what_ours_gain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--networks", "timm:mobilenetv2_050", "--image-size", "32", "--batch-sizes", "1", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["engine_latency.py", *small])
    monkeypatch.setattr(engine_latency, "SECONDS", 1)
    engine_latency.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    bf16 = cpu_has_bf16()
    assert titles == [
        "network, batch",
        "ORT FP32 (ms)",
        "OpenVINO FP32",
        *["OpenVINO bf16"] * bf16,
        *["ours w7a8, ORT", "ours w7a8, OpenVINO"] * (not cpu_has_exact_int8()),
        *OURS,
        *["ours INT8 + bf16, OpenVINO"] * bf16,
        "ORT's tool u8",
        "ORT's tool s8",
        "ORT's tool s8, OpenVINO",
        *["NNCF, OpenVINO", "NNCF less products, means, depthwise"] * (engine_latency.nncf is not None),
        "best of ours",
        "over its runtime's float",
    ]
    assert [row[0] for row in rows] == ["mobilenetv2_050, 1", "mobilenetv2_050, 2"]
    for row in rows:
        cells = dict(zip(titles, row, strict=True))
        assert float(cells.pop("ORT FP32 (ms)")) > 0
        speeds = {title: float(cell.split("x")[0]) for title, cell in cells.items() if title != titles[0]}
        assert min(speeds.values()) > 0
        best = max((title for title in speeds if title.startswith("ours")), key=speeds.__getitem__)
        assert speeds["best of ours"] == speeds[best]
        in_ort = best.endswith(", ORT")
        assert cells["best of ours"].endswith("(ORT)" if in_ort else "(OpenVINO)")
        floats = [1.0] if in_ort else [speeds[title] for title in titles if title.startswith("OpenVINO")]
        assert speeds["over its runtime's float"] == pytest.approx(speeds[best] / max(floats), rel=0.05)


def test_the_fastest_of_ours_is_compared_with_its_own_runtimes_float() -> None:
    medians = {engine_latency.BASE: 0.010, "OpenVINO FP32": 0.008, "OpenVINO bf16": 0.005}
    medians |= {"ours INT8, ORT": 0.006, "ours INT8, OpenVINO": 0.004, "ORT's tool u8": 0.002}
    row = engine_latency._row("timm:resnet50", 32, medians)
    assert row == "| resnet50, 32 | 10.0 | 1.25x | 2.00x | 1.67x | 2.50x | 5.00x | 2.50x (OpenVINO) | 1.25x |"
    medians["ours INT8, ORT"] = 0.001
    assert engine_latency._row("timm:resnet50", 32, medians).endswith("| 10.00x (ORT) | 10.00x |")


@pytest.mark.slow
def test_our_graph_runs_on_integers_as_the_tools_does(tmp_path: Path) -> None:
    columns = engine_graphs.count_operators("timm:mobilenetv2_050", 32, tmp_path)
    on_integers, rounding, in_float = (
        {title: engine_graphs.count_where(counts, where) for title, counts in columns.items()}
        for where in engine_graphs.WHERE
    )
    assert on_integers["float"] == rounding["float"] == 0
    assert on_integers["ours"] >= on_integers["tool u8"] > on_integers["tool s8"] > 0
    assert rounding["ours"] <= rounding["tool u8"] < rounding["tool s8"]
    assert in_float["ours"] <= in_float["tool u8"]
