"""benchmarks/engine_latency.py, in small."""

import sys

import engine_latency
import pytest


@pytest.mark.slow  # two quantization tools beside ours: about a minute
def test_the_table_has_every_engine_and_its_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--networks", "timm:mobilenetv2_050", "--image-size", "32", "--batch-sizes", "1", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["engine_latency.py", *small])
    engine_latency.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert titles[:3] == ["network, batch", "ORT FP32 (ms)", "OpenVINO FP32"]
    assert {"ours INT8, ORT", "ours INT8, OpenVINO", "ORT's tool u8", "ORT's tool s8"} <= set(titles)
    assert [row[0] for row in rows] == ["mobilenetv2_050, 1", "mobilenetv2_050, 2"]
    for row in rows:
        assert len(row) == len(titles)
        assert float(row[1]) > 0
        speeds = [float(cell.removesuffix("x")) for cell in row[2:]]
        ours = [speed for title, speed in zip(titles[2:], speeds, strict=True) if title.startswith("ours")]
        assert min(speeds) > 0
        assert speeds[-1] == max(ours)
