"""The command lines of NVIDIA's scripts, as ../reference/cli_flags.json holds them, parse to the same values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effnet_quant.cli.arguments import Parser, add_model_arguments, add_training_arguments

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "cli_flags.json").read_text())
FLAGS = [pytest.param(entry, id=entry["flags"][0]) for part in ("training", "model") for entry in REFERENCE[part]]
# where the reference has choices; --arch takes any registered model
CHOICES = [flag for flag in FLAGS if flag.values[0]["choices"] is not None and flag.id != "--arch"]


@pytest.fixture
def parser():
    built = Parser("main.py")
    add_training_arguments(built)
    return built


def action_of(parser, flag):
    return next(action for action in parser._actions if flag in action.option_strings)


@pytest.mark.parametrize("entry", FLAGS)
def test_flag_has_all_its_spellings(parser, entry):
    assert set(entry["flags"]) <= set(action_of(parser, entry["flags"][0]).option_strings)


@pytest.mark.parametrize("entry", FLAGS)
def test_flag_has_its_default(parser, entry):
    value = getattr(parser.parse(["DATA"]), action_of(parser, entry["flags"][0]).dest)
    expected = 0 if entry["flags"] == ["--gather-checkpoints"] else entry["default"]  # listed as the text "0", type int
    assert value == expected
    assert isinstance(value, bool) == isinstance(expected, bool)


@pytest.mark.parametrize("entry", CHOICES)
def test_flag_has_its_choices(parser, entry):
    assert set(action_of(parser, entry["flags"][0]).choices) >= set(entry["choices"])


@pytest.mark.parametrize("entry", FLAGS)
def test_flag_goes_where_it_went(parser, entry):
    expected = entry.get("dest", entry["flags"][0].lstrip("-").replace("-", "_"))
    assert action_of(parser, entry["flags"][0]).dest == expected


@pytest.mark.parametrize("flag", ["--data-backend", "--data-backends"])
def test_both_spellings_of_data_backend(parser, flag):
    assert parser.parse(["DATA", flag, "synthetic"]).data_backend == "synthetic"


@pytest.mark.parametrize("flag", ["--num-classes", "--num_classes"])
def test_both_spellings_of_num_classes(parser, flag):
    assert parser.parse(["DATA", flag, "37"]).num_classes == 37


@pytest.mark.parametrize(("text", "value"), [("True", True), ("False", False), ("false", False), ("1", True)])
def test_trt_means_what_it_says(text, value):
    parser = Parser("model2onnx.py")
    add_model_arguments(parser, None)
    assert parser.parse(["--trt", text]).trt is value


def test_trt_refuses_anything_else(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse(["DATA", "--trt", "maybe"])
    assert end.value.code == 2
    assert "expected True or False, not 'maybe'" in capsys.readouterr().err


def test_parser_knows_what_the_user_gave(parser):
    parsed = parser.parse(["DATA", "--epochs", "90", "--amp"])  # 90 is the default too
    assert {"data", "epochs", "amp"} <= parsed.explicit
    assert not {"batch_size", "nesterov", "data_backend"} & parsed.explicit


def test_flags_are_not_abbreviated(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse(["DATA", "--epoch", "3"])
    assert "--epoch" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["main.py", "quant_main.py", "checkpoint2model.py", "model2onnx.py", "classify.py"])
def test_help_is_printed(run_script, script):
    result = run_script(script, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: {script}")
