"""The command lines of NVIDIA's scripts, as ../reference/cli_flags.json holds them, parse to the same values."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from effnet_quant.cli.arguments import Parser, add_model_arguments, add_training_arguments
from effnet_quant.cli.training import settings
from effnet_quant.errors import UserError
from effnet_quant.training.config import TrainConfig

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


# what a flag becomes in the configuration that the trainer goes by
FIELDS = [
    ("-j 3", {"workers": 3}),
    ("--epochs 7", {"epochs": 7}),
    ("--run-epochs 3", {"run_epochs": 3}),
    ("--early-stopping-patience 4", {"early_stopping_patience": 4}),
    ("-b 8", {"batch_size": 8}),
    ("--optimizer-batch-size 512", {"optimizer_batch_size": 512}),
    ("--lr 0.3", {"lr": 0.3}),
    ("--lr-schedule cosine", {"lr_schedule": "cosine"}),
    ("--end-lr 0.01", {"end_lr": 0.01}),
    ("--warmup 2", {"warmup": 2}),
    ("--label-smoothing 0.1", {"label_smoothing": 0.1}),
    ("--mixup 0.2", {"mixup": 0.2}),
    ("--cutmix 0.3", {"cutmix": 0.3}),
    ("--optimizer rmsprop", {"optimizer": "rmsprop"}),
    ("--random-erasing 0.2", {"random_erasing": 0.2}),
    ("--layer-decay 0.7", {"layer_decay": 0.7}),
    ("--clip-grad-norm 1", {"clip_grad_norm": 1.0}),
    ("--freeze stem --freeze layers.0.*", {"freeze": ("stem", "layers.0.*")}),
    ("--momentum 0.8", {"momentum": 0.8}),
    ("--wd 0.01", {"weight_decay": 0.01}),
    ("--bn-weight-decay", {"bn_weight_decay": True}),
    ("--rmsprop-alpha 0.7", {"rmsprop_alpha": 0.7}),
    ("--rmsprop-eps 0.02", {"rmsprop_eps": 0.02}),
    ("--nesterov", {"nesterov": True}),
    ("--use-ema 0.99", {"use_ema": 0.99}),
    ("--seed 11", {"seed": 11}),
    ("--amp", {"amp": True}),
    ("--amp --amp-dtype bf16", {"amp": True, "amp_dtype": "bf16"}),
    ("--amp --static-loss-scale 256", {"amp": True, "static_loss_scale": 256.0}),
    ("--amp --dynamic-loss-scale", {"amp": True, "dynamic_loss_scale": True}),
    ("--compile", {"compile": True}),
    ("--jit script", {"compile": True}),
    ("--memory-format nhwc", {"channels_last": True}),
    ("--print-freq 3", {"print_freq": 3}),
    ("--prof 20", {"prof": 20}),
    ("--gather-checkpoints 5", {"gather_checkpoints": 5}),
    ("--checkpoint-every-steps 6", {"checkpoint_every_steps": 6}),
    ("--training-only", {"training_only": True}),
    ("--no-checkpoints", {"save_checkpoints": False}),
    ("--checkpoint-filename last.pth.tar", {"checkpoint_filename": "last.pth.tar"}),
    ("--topk 3", {"topk": 3}),
]


def configured(parser, flags):
    given = [] if "--seed" in flags else ["--seed", "0"]
    return settings(parser.parse(["DATA", *flags.split(), *given])).config


@pytest.mark.parametrize(("flags", "expected"), FIELDS, ids=[flags for flags, _ in FIELDS])
def test_flag_reaches_the_trainer(parser, flags, expected):
    assert configured(parser, flags) == replace(configured(parser, ""), **expected)


def test_no_field_of_the_trainers_configuration_is_out_of_reach():
    assert {name for _, expected in FIELDS for name in expected} == {field.name for field in fields(TrainConfig)}


def test_torchscript_and_a_loss_scale_without_amp_are_answered(parser, capsys):
    configured(parser, "--jit script --static-loss-scale 128")
    out = capsys.readouterr().out
    assert "--jit script: TorchScript has been superseded by torch.compile, which is used" in out
    assert "without --amp, --static-loss-scale and --dynamic-loss-scale do nothing" in out


def test_a_type_for_amp_needs_amp(parser):
    with pytest.raises(UserError, match="--amp-dtype bf16 says what --amp computes in; give both"):
        configured(parser, "--amp-dtype bf16")


def test_any_checkpoint_can_be_evaluated(run_script, image_folder, tmp_path):
    network = ["--arch", "cifar-resnet20", "--num-classes", 3, "--image-size", 32, "-j", 0, "--data-backend", "pytorch"]
    start = ["-b", 4, "--seed", 1, "--epochs", 1, "--optimizer", "rmsprop", "--checkpoint-every-steps", 1]
    result = run_script("main.py", image_folder, *network, *start, "--workspace", tmp_path)
    assert result.code == 0, result.err
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    torch.save({**state, "batch": 1, "epoch": 0}, tmp_path / "midway.pth.tar")
    for name in ("checkpoint", "midway"):  # the optimizer, the batch and the seed are others
        again = ["-b", 3, "--seed", 2, "--evaluate", "--epochs", 1, "--resume", tmp_path / f"{name}.pth.tar"]
        result = run_script("main.py", image_folder, *network, *again, "--workspace", tmp_path / "evaluation")
        assert result.code == 0, result.err
        assert "val.top1" in result.out
    for flags, says in (
        (["--weight-decay", 0.3, "--optimizer", "rmsprop"], "note: --weight-decay stays 0.0001"),
        (["--checkpoint-filename", "model_best.pth.tar"], "choose another"),
        (["--checkpoint-filename", "checkpoint_0000.pth.tar"], "choose another"),
    ):
        again = ["-b", 4, "--seed", 1, "--epochs", 1, "--resume", tmp_path / "checkpoint.pth.tar", *flags]
        result = run_script("main.py", image_folder, *network, *again, "--workspace", tmp_path / "evaluation")
        assert result.code == (0 if "note" in says else 2)
        assert says in result.err
