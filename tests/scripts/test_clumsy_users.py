"""What trips a new user is said in one sentence, with the command or the name that helps."""

from __future__ import annotations

import re
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from effnet_quant import UserError
from effnet_quant.cli import app
from effnet_quant.cli.train import build_parser as train_parser
from effnet_quant.report.training_picture import draw_training
from effnet_quant.terminal import shell_word


@pytest.fixture
def verb(monkeypatch, capsys, tmp_path):
    """Runs effnet-quant in an empty folder: (*words) -> (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["effnet-quant", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("train", "DATA", "--epoch", "3"), "there is no flag --epoch; did you mean --epochs?"),
        (("train", "--worksapce=x", "DATA"), "there is no flag --worksapce; did you mean --workspace?"),
        (("train", "DATA", "--zzz"), "there is no flag --zzz; effnet-quant train -h lists the flags."),
        (("verify", "DATA", "--engin", "x.onnx"), "there is no flag --engin; did you mean --engine?"),
        (("train", "my", "cells"), "there is no place for the word 'cells'; put quotes around a path with spaces."),
        (
            ("classify", "a.onnx"),
            "the following arguments are required: --image; effnet-quant classify -h explains them.",
        ),
        (
            ("train", "DATA", "--epochs", "three"),
            "argument --epochs: invalid int value: 'three'; effnet-quant train -h explains it.",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(verb, words, sentence):
    assert verb(*words) == (2, "", f"error: {sentence}\n")


def test_a_flag_may_have_a_value_that_looks_like_one(verb):
    status, _, err = verb("train", "DATA", "--freeze=--features")
    assert (status, "there is no flag" in err) == (2, False)
    status, _, err = verb("train", "--", "--DATA")
    assert err.startswith("error: there is no data at --DATA")


def test_quantize_wants_the_folder_of_a_run(verb, tmp_path):
    for name in ("runs/2026-12-01-093000", "runs/2026-12-01-101500", "pictures/cat"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("2026-12-01-093000", "2026-12-01-101500"):
        (tmp_path / "runs" / name / "checkpoint.pth.tar").touch()
    run = "runs/2026-12-01-101500"
    for typed, sentence in {
        "runs/2026-12-01-10150": f"there is nothing at runs/2026-12-01-10150; the last run is {run}.",
        "runs": f"runs holds runs of effnet-quant train; name one, the last is {run}.",
        f"{run}/checkpoint.pth.tar": f"{run}/checkpoint.pth.tar is a file of a run; give its folder, {run}.",
        "pictures": "pictures is not the folder of a run of effnet-quant train; give such a folder, or trained weights "
        "with --pretrained-from-file, --pretrained or --resume.",
    }.items():
        assert verb("quantize", typed) == (2, "", f"error: {sentence}\n")


def test_a_stopped_run_names_the_command_that_finishes_it(verb, tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    (run / "run.yml").write_text("data: my cells\nepochs: 3\n")
    (run / "checkpoint.pth.tar").touch()
    assert verb("quantize", "a run") == (
        2,
        "",
        "error: a run holds no result.json, which effnet-quant train writes at its end; finish the training with "
        "effnet-quant train 'my cells' --resume 'a run/checkpoint.pth.tar', or add --epochs 1 to that to end it as it is.\n",
    )


def test_commands_to_copy_are_quoted(verb, tmp_path):
    assert shell_word("a b\n") == "'a b\\n'"
    assert shell_word("runs/2026") == "runs/2026"


def test_serve_wants_a_file(verb, tmp_path):
    (tmp_path / "run").mkdir()
    assert verb("serve", "run", "repository") == (2, "", "error: run is a folder; name a file in it.\n")


def test_predict_of_one_picture_names_classify(verb, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    with pytest.raises(
        UserError, match=r"^photo.jpg is neither a folder nor a .tar file; effnet-quant classify --image"
    ):
        from effnet_quant.data.image_parts import image_parts

        image_parts("photo.jpg")


def test_data_that_is_not_there(verb, tmp_path):
    status, out, err = verb("train", "mycells")
    assert (status, out) == (2, "")
    assert err.startswith(
        "error: there is no data at mycells; give a folder with a folder of each class, or with train/ and"
    )
    status, out, err = verb("train", "")
    assert err.startswith("error: DATA is empty; give a folder with a folder of each class")


def test_the_help_of_train_does_not_show_defaults_that_the_preset_replaces(monkeypatch):
    from effnet_quant.jobs.preset import choose_preset

    monkeypatch.setattr("effnet_quant.jobs.preset.within_reach", lambda place: False)
    monkeypatch.setattr(sys, "argv", ["effnet-quant train"])
    parser = train_parser()
    nvidia = vars(parser.parse_args(["DATA"]))
    preset = choose_preset("digits").values()
    text = parser._get_formatter()
    for action in parser._actions:
        differs = action.dest in preset and (preset[action.dest] or None) != (nvidia[action.dest] or None)
        if differs and action.dest not in ("seed", "print_freq") and action.nargs != 0:
            assert "chosen" in text._expand_help(action), action.dest
    assert re.search(r"dropout before the classifier \(default: the\s+model's\)", parser.format_help())


@pytest.mark.parametrize("epochs", [0, -3])
def test_a_training_of_no_epochs_is_refused_before_it_has_a_folder(verb, tmp_path, epochs):
    sentence = f"error: --epochs must be 1 or more, not {epochs}; leave it out for as many as the data needs.\n"
    assert verb("train", "digits", "--epochs", epochs) == (2, "", sentence)
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_quantize_tells_of_the_folder_of_a_training(verb):
    status, out, _ = verb("quantize", "-h")
    assert status == 0
    assert "from the folder of a training, without" in out
    assert re.search(r"^  DATA +the folder of a training \(runs/\.\.\.\), or a folder with", out, re.MULTILINE)


def test_class_names_without_a_glyph_are_numbers_in_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_training(
            tmp_path / "p.png",
            "t",
            [1.0, 0.5],
            [50.0, 60.0],
            2,
            ["rot", "\u767d\u8840\u7403"],
            np.array([[2, 0], [1, 1]]),
        )
    assert Image.open(tmp_path / "p.png").width > 500


@pytest.mark.slow
def test_a_part_of_a_training_says_how_to_go_on(verb, tmp_path, monkeypatch):
    monkeypatch.setattr("effnet_quant.jobs.preset.within_reach", lambda place: False)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "my cells" / name).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my cells" / name / f"{index}.png")
    status, out, _ = verb("train", "my cells", "--epochs", 3, "--run-epochs", 2, "--workspace", "a run")
    assert status == 0
    assert re.search(r"^epoch 1/3: .*, about \d+ s left$", out, re.MULTILINE)
    assert out.endswith("trained 2 of 3 epochs; go on with --resume 'a run/checkpoint.pth.tar'\n")
    status, out, _ = verb("train", "my cells", "--resume", "a run/checkpoint.pth.tar", "--epochs", 1)
    assert status == 0
    assert out.endswith("next: effnet-quant quantize 'a run'\n")
    assert (tmp_path / "a run" / "result.json").is_file()
