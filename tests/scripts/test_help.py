"""-h: flags in groups, with their defaults, and an example at the end."""

from __future__ import annotations

import sys

import pytest

from effnet_quant.cli.app import VERBS
from effnet_quant.cli.main import build_parser
from effnet_quant.cli.quant_main import build_parser as build_quant_parser


def help_of(build, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.setenv("COLUMNS", "200")
    return build().format_help()


def test_flags_stand_in_groups_with_their_defaults(monkeypatch):
    text = help_of(build_quant_parser, "effnet-quant quantize", monkeypatch)
    groups = ("model", "data", "training", "arithmetic", "the run and its files", "quantization spec", "calibration")
    places = [text.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)
    for shown in (
        "--epochs EPOCHS       epochs of the whole training (default: 90)",
        "momentum; AdamW's beta1 (default: 0.9)",
        "dropout before the classifier (default: the model's)",
        "percent of magnitudes inside the range (default: 99.9",
        "image loader (default: pytorch)",  # its own words
    ):
        assert shown in text
    assert "(default: None)" not in text and "(default: False)" not in text and "==SUPPRESS==" not in text


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("effnet-quant train", f"effnet-quant train {VERBS['train'].example}"),
        ("main.py", "python main.py DATA --arch efficientnet-b0 --epochs 90"),
    ],
)
def test_the_last_line_is_an_example(monkeypatch, command, example):
    assert help_of(build_parser, command, monkeypatch).endswith(f"example:\n  {example}\n")
