"""What users get wrong: one sentence that names the thing and the way out, status 2, no traceback, nothing half-written.

Some mistakes run as real processes, side by side; the others, and variants of all, in this process.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from effnet_quant import create_model
from effnet_quant.models.weights import write_weights

TRAIN = shlex.split("--num-classes 3 --image-size 32 -b 6 --data-backend pytorch -j 0 --epochs 1 --prof 1 --seed 0")
FLOAT = ["--arch", "efficientnet-b0", *TRAIN]
QUANTIZED = ["--arch", "efficientnet-quant-b0", *TRAIN]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@dataclass
class Mistake:
    """A command line that is wrong, and what its sentence must say."""

    script: str
    arguments: list
    says: str


@dataclass
class Stage:
    """Data and files, good and bad, to make mistakes with; not to be changed."""

    root: Path
    good: Path
    checkpoint: Path
    weights: Path

    def make(self, name, write):
        """The path of the file ``name``, written by ``write(path)`` at its first use."""
        path = self.root / name
        if not path.exists():
            write(path)
        return path

    @property
    def corrupt(self):
        content = bytearray(self.checkpoint.read_bytes())
        content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
        content[-200:] = b"\x55" * 200  # the archive's directory
        return self.make("corrupt.pth.tar", lambda path: path.write_bytes(content))

    @property
    def truncated(self):
        content = self.checkpoint.read_bytes()
        return self.make("truncated.pth.tar", lambda path: path.write_bytes(content[: len(content) // 2]))

    @property
    def hostile(self):
        content = {"epoch": 1, "state_dict": {"w": torch.ones(2)}, "x": Hostile(self.marker)}
        return self.make("hostile.pth.tar", lambda path: torch.save(content, path))

    @property
    def marker(self):
        return self.root / "the-pickle-was-executed"


@pytest.fixture(scope="module")
def stage(image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("stage")
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint = root / "good.pth.tar"
    torch.save(
        {"epoch": 1, "batch": 0, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint
    )
    weights = root / "good.safetensors"
    write_weights(weights, model.state_dict())
    return Stage(root, image_folder, checkpoint, weights)


def mistakes(stage, write_images):
    """Each mistake of the issue's list, by name."""
    empty = stage.root / "empty"
    (empty / "train" / "apple").mkdir(parents=True)
    (empty / "val" / "apple").mkdir(parents=True)
    (empty / "train" / "apple" / "readme.txt").write_text("the images are elsewhere")
    stranger = stage.root / "stranger"
    shutil.copytree(stage.good, stranger)
    write_images(stranger / "val" / "zebra", 1)
    spoiled = stage.root / "spoiled"
    shutil.copytree(stage.good, spoiled)
    for image in (spoiled / "train").rglob("*.jpg"):
        image.write_text("no image at all")
    (stage.root / "file").write_text("not a folder")
    return {
        "missing folder": Mistake(
            "main.py", [stage.root / "nowhere", *FLOAT], r"/nowhere; give a folder with a folder"
        ),
        "no images": Mistake("main.py", [empty, *FLOAT], r"no images in .*/empty/train; expected <class>/<image>"),
        "class that train lacks": Mistake(
            "main.py", [stranger, *FLOAT], r"/stranger/val .*: zebra; add them to train/"
        ),
        "wrong arch": Mistake(
            "main.py",
            [stage.good, *FLOAT, "--arch", "efficientnet-bo"],
            r"'efficientnet-bo'; did you mean: efficientnet-b",
        ),
        "truncated checkpoint": Mistake(
            "main.py",
            [stage.good, *FLOAT, "--pretrained-from-file", stage.truncated],
            r"/truncated\.pth\.tar is truncated.*get it again",
        ),
        "another class count": Mistake(
            "quant_main.py",
            ["digits", *QUANTIZED, "--num-classes", 10, "--evaluate", "--pretrained-from-file", stage.weights],
            r"/good\.safetensors has 3 classes, but digits has 10; give data of these classes",
        ),
        "hostile pickle": Mistake(
            "main.py",
            [stage.good, *FLOAT, "--resume", stage.hostile],
            r"/hostile\.pth\.tar is refused: .*mkdir.*convert it to \.safetensors",
        ),
        "unwritable workspace": Mistake(
            "main.py",
            [stage.good, *FLOAT, "--workspace", stage.root / "file" / "below"],
            r"/file/below: Not a directory; choose another folder with --workspace",
        ),
        "image that is no image": Mistake(
            "main.py",
            [spoiled, *FLOAT, "-j", 1, "--max-bad-images", 0],
            r"/spoiled/train/\w+/0\d\.jpg is not an image.*replace or remove it",
        ),
    }


NAMES = (
    "missing folder",
    "no images",
    "class that train lacks",
    "wrong arch",
    "truncated checkpoint",
    "another class count",
    "hostile pickle",
    "unwritable workspace",
    "image that is no image",
)


PROCESSES = ("hostile pickle", "image that is no image")


@pytest.fixture(scope="module")
def runs(stage, write_images, run_process, run_script, tmp_path_factory):
    """Every mistake in a folder of its own: name -> (mistake, result, folder)."""
    made = mistakes(stage, write_images)
    folders = {name: tmp_path_factory.mktemp(re.sub(r"\W", "_", name)) for name in made}

    def arguments(name):
        workspace = [] if "--workspace" in made[name].arguments else ["--workspace", folders[name] / "runs"]
        return [made[name].script, *made[name].arguments, *workspace]

    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {name: pool.submit(run_process, *arguments(name), cwd=folders[name]) for name in PROCESSES}
        results = {name: run.result() for name, run in started.items()}
    before = os.getcwd()
    for name in made.keys() - results.keys():
        os.chdir(folders[name])
        try:
            results[name] = run_script(*arguments(name))
        finally:
            os.chdir(before)
    return {name: (made[name], results[name], folders[name]) for name in made}


def assert_one_sentence(result, says):
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    (line,) = result.error_lines
    assert re.search(says, line), line
    assert line.endswith((".", "?"))


def written(folder):
    """Files below ``folder``, but for the metrics log and the flags, which a run writes before its first batch."""
    early = ("experiment_raport.json", "run.yml")
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name not in early]


@pytest.mark.parametrize("name", NAMES)
def test_mistake_is_one_sentence_with_status_2(runs, name):
    mistake, result, _ = runs[name]
    assert_one_sentence(result, mistake.says)


@pytest.mark.parametrize("name", NAMES)
def test_mistake_leaves_nothing_half_written(runs, name):
    assert written(runs[name][2]) == []


def test_every_mistake_has_run(runs):
    assert set(runs) == set(NAMES)


def test_hostile_pickle_was_never_executed(runs, stage):
    assert "hostile pickle" in runs
    assert not stage.marker.exists()


@pytest.fixture
def assert_refused(run_script, tmp_path):
    """Runs a script in this process in an empty folder and checks how it ends: (says, script, *arguments)."""

    def check(says, script, *arguments):
        if script in ("main.py", "quant_main.py"):
            arguments = [*arguments, "--workspace", tmp_path / "runs"]
        assert_one_sentence(run_script(script, *arguments), says)
        assert written(tmp_path) == []

    return check


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data-backend", "dali-gpu"], "--data-backend dali-gpu needs an NVIDIA GPU, and there is none"),
        (["--crop-pct", 1.5], "--crop-pct must be above 0 and at most 1, not 1.5"),
    ],
)
def test_flag_that_does_nothing_yet_is_refused(assert_refused, stage, flags, says):
    assert_refused(says, "main.py", stage.good, *FLOAT, *flags)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch-size", 0),
        ("--workers", -1),
        ("--prefetch", 0),
        ("--image-size", -5),
        ("--image-size", 0),
        ("--prof", 0),
        ("--print-freq", 0),
        ("--topk", 0),
        ("--epochs", -1),
        ("--warmup", -1),
        ("--lr", -1),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--momentum", -1),
        ("--momentum", 1.5),
        ("--weight-decay", -1),
        ("--dropout", 2),
        ("--survival-prob", 2),
        ("--label-smoothing", 2),
        ("--optimizer-batch-size", 9),
        ("--bn-epsilon", -1),
        ("--bn-momentum", -1),
        ("--rmsprop-alpha", -1),
        ("--rmsprop-alpha", 2),
        ("--rmsprop-eps", -1),
        ("--seed", 2**70),
        ("--mixup", -1),
        ("--cutmix", -1),
        ("--use-ema", 1.5),
        ("--gather-checkpoints", -2),
        ("--checkpoint-every-steps", -1),
        ("--static-loss-scale", 0),
    ],
)
def test_number_out_of_range_is_refused(assert_refused, stage, flag, value):
    assert_refused(flag, "main.py", stage.good, *FLOAT, "--optimizer", "rmsprop", flag, value)


@pytest.mark.parametrize("script", ["main.py", "quant_main.py"])
@pytest.mark.parametrize("flag", ["--resume", "--pretrained-from-file"])
@pytest.mark.parametrize("kind", ["corrupt", "truncated", "hostile"])
def test_damaged_or_hostile_file_is_refused_everywhere(assert_refused, stage, script, flag, kind):
    arguments = FLOAT if script == "main.py" else QUANTIZED
    assert_refused(rf"/{kind}\.pth\.tar is ", script, stage.good, *arguments, flag, getattr(stage, kind))
    assert not stage.marker.exists()


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "hostile"])
def test_damaged_or_hostile_file_yields_no_weights(assert_refused, stage, tmp_path, kind):
    output = tmp_path / "weights.safetensors"
    source = getattr(stage, kind)
    says = rf"/{kind}\.pth\.tar is "
    assert_refused(says, "checkpoint2model.py", "--checkpoint-path", source, "--weight-path", output)
    assert not stage.marker.exists()


@pytest.mark.parametrize("how", [["--resume"], ["--evaluate", "--pretrained-from-file"]])
def test_weights_of_another_class_count_are_refused(assert_refused, stage, how):
    says = r"/good\.pth\.tar has 3 classes, but digits has 10; give data of these classes"
    assert_refused(says, "main.py", "digits", *FLOAT, "--num-classes", 10, *how, stage.checkpoint)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--pretrained"], "--pretrained and --pretrained-from-file both bring weights"),
        (["--resume", "any.pth.tar"], "no file any.pth.tar"),
        (["--ema"], r"/good\.safetensors holds no moving average of the weights; leave out --ema"),
        (["--arch", "timm:nothing"], "timm has no model 'nothing'"),
        (["--arch", "cifar-resnet20", "--trt", "True"], "cifar-resnet20 has no option 'se_as_conv'; leave it out"),
    ],
)
def test_weights_and_options_that_do_not_go_together_are_refused(assert_refused, stage, flags, says):
    assert_refused(says, "main.py", stage.good, *FLOAT, "--pretrained-from-file", stage.weights, *flags)


def test_ema_wants_a_checkpoint(assert_refused, stage):
    assert_refused("--ema chooses among the weights of a checkpoint", "main.py", stage.good, *FLOAT, "--ema")
    output = ["--weight-path", stage.root / "never.pth"]
    says = r"/good\.pth\.tar holds no moving average"
    assert_refused(says, "checkpoint2model.py", "--checkpoint-path", stage.checkpoint, "--ema", *output)


def test_published_weights_that_do_not_exist_are_refused(assert_refused, stage):
    says = "no weights of efficientnet-b1 are published; give a file with --pretrained-from-file"
    assert_refused(says, "main.py", stage.good, *FLOAT, "--arch", "efficientnet-b1", "--pretrained")


def test_data_of_another_class_count_is_refused(assert_refused, stage):
    says = r"images0? has 3 classes, but the model has 1000; pass --num-classes 3"
    assert_refused(says, "main.py", stage.good, *FLOAT, "--num-classes", 1000)


def test_float_checkpoint_is_no_quantized_run_to_resume(assert_refused, stage):
    assert_refused(r"/good\.pth\.tar", "quant_main.py", stage.good, *QUANTIZED, "--resume", stage.checkpoint)


def test_checkpoint_resumes_with_the_other_form_of_squeeze_and_excitation_or_is_refused(run_script, stage, tmp_path):
    made = run_script("main.py", stage.good, *FLOAT, "--workspace", tmp_path)
    assert made.code == 0, made.err
    again = ["--trt", "True", "--epochs", 2, "--resume", tmp_path / "checkpoint.pth.tar", "--workspace", tmp_path]
    result = run_script("main.py", stage.good, *FLOAT, *again)
    if result.code == 0:
        assert "epoch 2/2" in result.out
    else:
        assert_one_sentence(result, r"checkpoint\.pth\.tar")


@pytest.mark.parametrize(
    "damage",
    [
        {"state_dict": {"stem.conv.weight": 1}},
        {"epoch": "three"},
        {"optimizer": [1, 2]},
        {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}},
        {"rng": torch.ones(3)},
        {"rng": [torch.zeros(5056, dtype=torch.uint8)]},
        {"batch": -1},
        {"config": "x"},
        {"metadata": [1]},
    ],
    ids=lambda damage: str(next(iter(damage))),
)
def test_checkpoint_with_a_wrong_entry_is_refused(assert_refused, stage, damage):
    path = stage.root / "odd.pth.tar"
    torch.save({**torch.load(stage.checkpoint, weights_only=True), **damage}, path)
    assert_refused(r"odd\.pth\.tar", "main.py", stage.good, *FLOAT, "--epochs", 2, "--resume", path)


def test_quantized_model_goes_to_quant_main(assert_refused, stage):
    assert_refused("efficientnet-quant-b0 .*quant_main.py", "main.py", stage.good, *QUANTIZED)


def test_float_model_goes_to_main(assert_refused, stage):
    assert_refused("efficientnet-b0 .*--arch efficientnet-quant-b0", "quant_main.py", stage.good, *FLOAT)


def test_quantization_wants_weights(assert_refused, stage):
    assert_refused("--pretrained-from-file", "quant_main.py", stage.good, *QUANTIZED)


def test_float_weights_are_not_evaluated_as_quantized_ones(assert_refused, stage):
    weights = ["--pretrained-from-file", stage.weights]
    says = r"/good\.safetensors holds float weights"
    assert_refused(says, "quant_main.py", stage.good, *QUANTIZED, "--evaluate", *weights)


def test_float_weights_are_not_exported_as_quantized_ones(assert_refused, stage, tmp_path):
    files = ["--pretrained-from-file", stage.weights, "--output", tmp_path / "model.onnx"]
    says = r"/good\.safetensors holds float weights"
    assert_refused(says, "model2onnx.py", "--arch", "efficientnet-quant-b0", *files)


def test_spoiled_validation_image_is_named(assert_refused, stage, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "spoiled"
    shutil.copytree(stage.good, data)
    (data / "val/apple/00.jpg").write_bytes(b"")
    assert_refused(
        r"/val/apple/00\.jpg is not an image", "main.py", data, *FLOAT, "--evaluate", "-j", 2, "--max-bad-images", 0
    )


@pytest.mark.parametrize("output", ["nowhere/w.safetensors", "weights.bin", "file/w.pth"])
def test_weights_that_cannot_be_written_are_named(assert_refused, stage, tmp_path_factory, output):
    folder = tmp_path_factory.mktemp("output")
    (folder / "file").touch()
    says = re.escape(str(folder / output))
    assert_refused(says, "checkpoint2model.py", "--checkpoint-path", stage.checkpoint, "--weight-path", folder / output)
    assert written(folder) == ["file"]


@pytest.mark.parametrize("script", ["model2onnx.py", "classify.py"])
def test_inference_wants_an_arch_and_weights(assert_refused, stage, script):
    image = ["--image", stage.good / "val/cat/00.jpg"] if script == "classify.py" else []
    assert_refused("--pretrained-from-file", script, "--arch", "efficientnet-b0", *image)
    assert_refused("--arch", script, "--pretrained-from-file", stage.weights, *image)
    assert_refused(
        r"no file .*gone\.pth", script, "--arch", "efficientnet-b0", "--pretrained-from-file", "gone.pth", *image
    )
    assert_refused("'resnet5'", script, "--arch", "resnet5", "--pretrained-from-file", stage.weights, *image)


def test_image_to_classify_is_checked(assert_refused, stage):
    model = ["--arch", "efficientnet-b0", "--pretrained-from-file", stage.weights]
    assert_refused(r"no file .*gone\.jpg", "classify.py", *model, "--image", "gone.jpg")
    assert_refused(r"good\.pth\.tar is not an image", "classify.py", *model, "--image", stage.checkpoint)


def test_onnx_file_to_classify_with_is_checked(assert_refused, stage, tmp_path_factory):
    image = ["--image", stage.good / "val/cat/00.jpg"]
    broken = tmp_path_factory.mktemp("onnx") / "broken.onnx"
    broken.write_bytes(b"no ONNX file at all")
    assert_refused(r"/broken\.onnx is .*damaged", "classify.py", "--pretrained-from-file", broken, *image)
    assert_refused(r"no file .*gone\.onnx", "classify.py", "--pretrained-from-file", "gone.onnx", *image)


def test_debug_shows_the_traceback(run_script, tmp_path):
    from effnet_quant import UserError

    with pytest.raises(UserError, match="nowhere"):
        run_script("main.py", tmp_path / "nowhere", *FLOAT, "--debug")
