"""run.yml and --config: a run's flags in a file, and the run again from it."""

from __future__ import annotations

import pytest
import torch
import yaml

from effnet_quant.cli.main import build_parser
from effnet_quant.cli.quant_main import build_parser as build_quant_parser
from effnet_quant.errors import UserError

SMALL = ["digits", "--arch", "cifar-resnet20", "--image-size", 16, "-b", 32, "--prof", 2, "--epochs", 1, "-j", 0]


def weights_of(folder):
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_the_file_of_a_run_repeats_it_to_the_bit(run_script, tmp_path):
    tuned = ["--optimizer", "adamw", "--lr", 1e-3, "--freeze", "conv1", "--freeze", "bn1", "--random-erasing", 0.3]
    first = run_script("main.py", *SMALL, *tuned, "--workspace", tmp_path / "a")
    assert first.code == 0, first.err
    again = run_script("main.py", "--config", tmp_path / "a/run.yml", "--workspace", tmp_path / "b")
    assert again.code == 0, again.err
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)
    files = [yaml.safe_load((tmp_path / name / "run.yml").read_text()) for name in "ab"]
    assert isinstance(files[0]["seed"], int)  # which was drawn
    assert {**files[0], "workspace": str(tmp_path / "b")} == files[1]
    # and of a quantization that starts from it; an evaluation leaves the file alone
    start = ["--pretrained-from-file", tmp_path / "a/checkpoint.pth.tar", "--calibration-images", 32]
    quantized = run_script("quant_main.py", *SMALL[:-4], "--epochs", 0, "-j", 0, *start, "--workspace", tmp_path / "c")
    assert quantized.code == 0, quantized.err
    before = (tmp_path / "c/run.yml").read_bytes()
    more = ["--evaluate", "--resume", tmp_path / "c/checkpoint.pth.tar", "--workspace", tmp_path / "c"]
    assert run_script("quant_main.py", *SMALL, *more).code == 0
    assert (tmp_path / "c/run.yml").read_bytes() == before
    again = run_script("quant_main.py", "--config", tmp_path / "c/run.yml", "--workspace", tmp_path / "d")
    assert again.code == 0, again.err
    one, other = weights_of(tmp_path / "c"), weights_of(tmp_path / "d")
    assert all(torch.equal(one[name], other[name]) for name in one)


def parsed(tmp_path, text, *arguments, parser=build_parser):
    path = tmp_path / "run.yml"
    path.write_text(text)
    return parser().parse([*arguments, "--config", str(path)])


def test_flags_of_the_command_line_win(tmp_path):
    text = "data: there\nwd: 0.1\nbatch-size: 8\namp: true\nrun_epochs: -1\nfreeze: [a, b]\nwandb: null\n"
    values = parsed(tmp_path, text, "here", "--weight-decay", "0.2", "--freeze", "c")
    assert (values.data, values.weight_decay, values.batch_size, values.amp) == ("here", 0.2, 8, True)
    assert (values.run_epochs, values.freeze, values.wandb, values.epochs) == (-1, ["c"], None, 90)
    assert {"batch_size", "amp", "data"} <= values.explicit and not {"wandb", "epochs"} & values.explicit
    assert parsed(tmp_path, text, "--lr", "1").data == "there"
    assert parsed(tmp_path, text, "--lr", "1").freeze == ["a", "b"]


@pytest.mark.parametrize("build", [build_parser, build_quant_parser])
def test_every_flag_goes_through_a_file_and_back(tmp_path, build):
    """What a run's file would hold of each flag gives the flag's value again."""
    for action in build()._actions:
        if not action.option_strings or action.dest in ("help", "debug", "config"):
            continue
        value = not action.default if action.nargs == 0 else (action.choices or [None])[-1] or action.type or str
        value = value("1") if callable(value) else value
        value = [value] if action.dest in ("freeze", "quant_override") else value
        text = yaml.safe_dump({"data": "DATA", action.dest: value})
        assert getattr(parsed(tmp_path, text, parser=build), action.dest) == value, action.dest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epcohs: 3", r"run\.yml has an unknown key 'epcohs'; did you mean: epochs"),
        ("quant_spec: w8a8", "unknown key 'quant_spec'"),
        ("config: run.yml", "unknown key 'config'"),
        ("wd: 1\nweight_decay: 1", "has the flag --weight-decay twice"),
        ("amp: 3", "amp is a switch, true or false, not 3"),
        ("lr: [1]", r"lr is \[1\], not a single value"),
        ("freeze: [[a]]", r"freeze is \['a'\], not a single value"),
        ("data: 3", "data is 3, not a name"),
        ("- epochs", "holds no flags"),
        ("", "holds no flags"),
        ("a: &a [*a]", "more than 65,536 values"),
        ("[" * 50_000, "nested more than 16 deep"),
        ("lr: !!python/object/apply:os.system [true]", "is no YAML"),
        ("epochs: " + "9" * 2**21, "longer than 1,048,576"),
    ],
)
def test_files_that_hold_no_flags_are_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        parsed(tmp_path, text, "DATA")


def test_a_file_that_is_not_there_and_a_value_of_another_type_end_the_script(run_script, tmp_path):
    result = run_script("main.py", "--config", tmp_path / "gone.yml")
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert "gone.yml can't be read: No such file or directory" in result.err
    (tmp_path / "run.yml").write_text("lr: fast")
    result = run_script("main.py", "DATA", "--config", tmp_path / "run.yml")
    assert result.code == 2
    assert "argument --lr/--learning-rate: invalid float value: 'fast'" in result.err
    (tmp_path / "run.yml").write_text("lr: 1")
    result = run_script("main.py", "--config", tmp_path / "run.yml")
    assert result.code == 2 and "arguments are required: DATA" in result.err
    assert run_script("main.py", "-h", "--config", tmp_path / "gone.yml").code == 0
