"""The flags that several scripts share, with the names and defaults of NVIDIA's EfficientNet for PyTorch."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from effnet_quant.cli.app import example_of
from effnet_quant.cli.process import typed_command
from effnet_quant.cli.run_file import with_run_file
from effnet_quant.data.choices import AUGMENTATIONS, BACKENDS, INTERPOLATIONS
from effnet_quant.terminal import printable
from effnet_quant.training.choices import AFFINITIES, AMP_DTYPES, OPTIMIZERS, SCHEDULES


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of each flag that has one, and examples line by line."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        said = text is None or "default" in text or action.nargs == 0 or not action.option_strings
        if said or default is None or default is argparse.SUPPRESS:
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        shown = f"{default:g}" if isinstance(default, float) else str(default).replace("%", "%%")
        return f"{text} (default: {shown})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Parses arguments, and notes in ``explicit`` which ones the user gave."""

    def __init__(self, description: str) -> None:
        command = typed_command()
        super().__init__(
            prog=command,
            description=description,
            epilog=example_of(command),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments and add the set ``explicit``. Wrong arguments print a sentence and exit with status 2.

        The values of a file of ``--config``, if the script has this flag, count as given.

        Raises:
            UserError: the file of ``--config`` can't be used.
        """
        self._check_spelling(arguments)
        path = self._config_file(arguments)
        if path is not None:
            arguments = with_run_file(list(arguments), path, self._given(arguments, open_ended=True), self)
        parsed, others = self.parse_known_args(arguments)
        if others:
            self._fail(
                f"there is no place for the word '{printable(others[0])}'; put quotes around a path with spaces."
            )
        parsed.explicit = self._given(arguments)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print a line, not the usage of all flags, which would hide it; exit with status 2."""
        them = "it" if message.startswith("argument ") else "them"
        self._fail(f"{printable(message)}; {self.prog} -h explains {them}.")

    def _fail(self, sentence: str) -> NoReturn:
        self.exit(2, f"error: {sentence}\n")

    def _check_spelling(self, arguments: Sequence[str]) -> None:
        """End with a sentence if a word looks like a flag and is none. argparse would first ask for what is missing."""
        for word in arguments:
            flag = word.partition("=")[0]
            if word == "--":
                return
            if not flag.startswith("--") or " " in flag or flag in self._option_string_actions:
                continue
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else f"{self.prog} -h lists the flags."
            self._fail(f"there is no flag {printable(flag)}; {hint}")

    def _config_file(self, arguments: Sequence[str]) -> str | None:
        """The file of ``--config``; None if the script has no such flag, or the command line does not give it."""
        if not any(action.dest == "config" for action in self._actions) or {"-h", "--help"} & set(arguments):
            return None
        alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        alone.add_argument("--config")
        return alone.parse_known_args(arguments)[0].config

    def _given(self, arguments: Sequence[str], *, open_ended: bool = False) -> set[str]:
        """The names of the values that arguments give. ``open_ended``: positional ones may be missing."""
        before = [(action, action.default, action.nargs) for action in self._actions]
        for action in self._actions:
            action.default = argparse.SUPPRESS
            if open_ended and not action.option_strings:
                action.nargs = "?"
        try:
            return set(vars(self.parse_args(arguments)))
        finally:
            for action, default, nargs in before:
                action.default, action.nargs = default, nargs


def boolean(text: str) -> bool:
    """Parse the value of flags such as ``--trt True``."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not '{text}'")


def add_model_arguments(parser: argparse._ActionsContainer, default_arch: str | None) -> None:
    """Add the flags of the architecture, its options and its weights."""
    parser = parser.add_argument_group("model")
    default = f", else {default_arch}" if default_arch else ""
    parser.add_argument(
        "--arch",
        "-a",
        default=default_arch,
        help=f"model name, e.g. efficientnet-b0, timm:resnet50 (default: the weights file's{default})",
    )
    parser.add_argument(
        "--num-classes",
        "--num_classes",
        type=int,
        default=1000,
        help="number of classes (default: the data's, else the weights')",
    )
    parser.add_argument(
        "--conv-init",
        "--conv_init",
        choices=("fan_in", "fan_out"),
        default="fan_in",
        help="convolution initialisation (default: the model's)",
    )
    parser.add_argument(
        "--bn-momentum",
        "--bn_momentum",
        type=float,
        default=1 - 0.99,
        help="momentum of BatchNorm's statistics (default: the model's)",
    )
    parser.add_argument(
        "--bn-epsilon", "--bn_epsilon", type=float, default=1e-3, help="epsilon of BatchNorm (default: the model's)"
    )
    parser.add_argument(
        "--survival-prob",
        "--survival_prob",
        type=float,
        default=1,
        help="survival probability of the last block (default: the model's)",
    )
    parser.add_argument(
        "--dropout", type=float, default=0.2, help="dropout before the classifier (default: the model's)"
    )
    parser.add_argument(
        "--trt",
        type=boolean,
        default=False,
        help="EfficientNet's squeeze-and-excitation as 1x1 convolutions (default: True only for efficientnet-quant-*)",
    )
    parser.add_argument(
        "--hard-swish",
        action="store_true",
        help="replace SiLU by hard-swish, which is faster in 8 bits but needs training (default: as in the weights)",
    )
    parser.add_argument("--pretrained-from-file", metavar="FILE", help="weights: .safetensors, .pth or .pth.tar")
    parser.add_argument("--pretrained", action="store_true", help="use the model's published weights (downloaded once)")
    parser.add_argument("--ema", action="store_true", help="use the moving average of a checkpoint's weights")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that main.py and quant_main.py share."""
    add_model_arguments(parser, "resnet50")
    _add_data_arguments(parser)
    _add_optimization_arguments(parser)
    _add_compute_arguments(parser)
    _add_run_arguments(parser)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the data: source, transforms, batch size."""
    add = parser.add_argument_group("data").add_argument
    add("data", metavar="DATA", help="a folder with train/ and val/, or another name from docs/data.md")
    add(
        "--data-backend",
        "--data-backends",
        choices=BACKENDS,
        default="dali-cpu",
        help="image loader (default: pytorch)",
    )
    add("--interpolation", choices=INTERPOLATIONS, default="bilinear", help="how images are resized")
    add("-j", "--workers", type=int, default=5, help="data loading processes")
    add("--prefetch", type=int, default=2, help="batches that each worker prepares ahead")
    add("--image-size", type=int, help="image size in pixels (default: the weights', else the model's)")
    add(
        "--crop-pct",
        type=float,
        help="share of an image's side that evaluation crops, as in timm (default: NVIDIA's crop)",
    )
    add("--smallest-crop", type=float, default=0.08, help="share of an image's area that a training crop has at least")
    add("--augmentation", choices=(None, *AUGMENTATIONS), default=None, help="augmentation policy for training images")
    add("--max-bad-images", type=int, default=50, help="unreadable images to report and leave out before the run stops")
    add("-b", "--batch-size", type=int, default=256, help="images per batch of one process")


def _add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of optimizer, schedule and regularisation."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=90, help="epochs of the whole training")
    add("--run-epochs", type=int, default=-1, help="epochs of this run; -1: all that are left")
    add("--early-stopping-patience", type=int, default=-1, help="stop after so many epochs without a better top-1")
    add("--optimizer-batch-size", type=int, default=-1, help="images per optimizer step (gradient accumulation)")
    add("--lr", "--learning-rate", type=float, default=0.1, help="learning rate")
    add("--lr-schedule", choices=SCHEDULES, default="step", help="learning rate schedule, by epoch")
    add("--end-lr", type=float, default=0, help="learning rate at the end of the schedule")
    add("--warmup", type=int, default=0, help="epochs of linear warm-up")
    add("--label-smoothing", type=float, default=0.0, help="label smoothing")
    add("--mixup", type=float, default=0.0, help="alpha of mixup")
    add("--cutmix", type=float, default=0.0, help="alpha of CutMix; with --mixup, each batch takes one at random")
    add(
        "--random-erasing",
        type=float,
        default=0.0,
        metavar="PROBABILITY",
        help="probability with which a box of a training image is erased",
    )
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="optimizer")
    add("--momentum", type=float, default=0.9, help="momentum; AdamW's beta1")
    add("--weight-decay", "--wd", type=float, default=1e-4, help="weight decay")
    add("--bn-weight-decay", action="store_true", help="apply weight decay to BatchNorm's parameters too")
    add("--rmsprop-alpha", type=float, default=0.9, help="RMSprop's smoothing constant")
    add("--rmsprop-eps", type=float, default=1e-3, help="RMSprop's epsilon")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add(
        "--layer-decay",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="factor of the learning rate from each layer to the one before it",
    )
    add("--clip-grad-norm", type=float, metavar="NORM", help="the largest norm of all gradients together")
    add(
        "--freeze",
        action="append",
        metavar="PATTERN",
        help="modules or parameters that are not trained, e.g. 'features.*'; may be repeated",
    )
    add("--use-ema", type=float, help="keep an exponential moving average of the weights, with this decay")
    add("--seed", type=int, help="random seed (default: a random one)")


def _add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the arithmetic."""
    add = parser.add_argument_group("arithmetic").add_argument
    add("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on the CPU")
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="type for --amp, in place of its default")
    add(
        "--tf32",
        type=boolean,
        default=True,
        help="on a GPU, TF32 instead of float32 in convolutions and matrix products",
    )
    add("--static-loss-scale", type=float, default=1, help="loss scale of float16")
    add("--dynamic-loss-scale", action="store_true", help="double the loss scale after 100 steps without overflow")
    add("--compile", action="store_true", help="use torch.compile")
    add("--jit", choices=("no", "script"), default="no", help="script: same as --compile")
    add("--memory-format", choices=("nchw", "nhwc"), default="nchw", help="memory layout of images and activations")
    add("--gpu-affinity", choices=AFFINITIES, default="none", help="bind processes to CPU cores near their GPU")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the run and its files."""
    add = parser.add_argument_group("the run and its files").add_argument
    add("--config", metavar="FILE", help="flags from a YAML file, e.g. an old run's run.yml; those given here win")
    add("--print-freq", "-p", type=int, default=10, help="batches between two progress lines, without a terminal")
    add("--resume", metavar="FILE", help="checkpoint to resume from")
    add("--prof", type=int, default=-1, help="run only so many batches per epoch, to measure speeds; -1: all")
    add("--gather-checkpoints", type=int, default=0, help="keep the checkpoints of the last so many epochs; -1: all")
    add(
        "--checkpoint-every-steps",
        type=int,
        default=0,
        help="optimizer steps between checkpoints within an epoch; 0: none",
    )
    add("--raport-file", default="experiment_raport.json", help="file of the metrics (JSON lines) in the workspace")
    add("--tensorboard", action="store_true", help="also write the metrics for TensorBoard, in the workspace")
    add("--wandb", metavar="PROJECT", help="also send the metrics to Weights & Biases")
    add("--evaluate", action="store_true", help="evaluate without training")
    add("--training-only", action="store_true", help="train without evaluating")
    add("--no-checkpoints", dest="save_checkpoints", action="store_false", help="write no checkpoints")
    add("--checkpoint-filename", default="checkpoint.pth.tar", help="name of the latest checkpoint")
    add("--workspace", default="./", help="folder for checkpoints and logs")
    add("--overwrite", action="store_true", help="replace the checkpoints of an earlier run in the workspace")
    add("--topk", type=int, default=5, help="k of the second accuracy, val.topk")


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The architecture's options that the user gave, as ``create_model`` takes them."""
    names = ("conv_init", "bn_momentum", "bn_epsilon", "survival_prob", "dropout")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names if name in arguments.explicit}
    if "trt" in arguments.explicit:
        options["se_as_conv"] = arguments.trt
    return options
