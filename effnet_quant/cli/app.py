"""``effnet-quant``: one command with a verb for each script."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from dataclasses import dataclass

from effnet_quant import __version__
from effnet_quant.cli.process import reader_left


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        module: module of ``effnet_quant.cli`` whose ``main`` does the work.
        summary: a line for the list of verbs.
        example: example arguments.
    """

    module: str
    summary: str
    example: str


VERBS = {
    "train": Verb("train", "train a float network; data and machine choose what no flag says", "DATA"),
    "quantize": Verb(
        "quantize",
        "from a training's folder to a verified INT8 engine; or as quant_main.py",
        "runs/2026-12-01-093000",
    ),
    "export": Verb(
        "model2onnx",
        "write an ONNX file for one runtime (model2onnx.py)",
        "--arch efficientnet-quant-b0 --pretrained-from-file qat.safetensors --target openvino",
    ),
    "deploy": Verb(
        "deploy",
        "find the fastest engine on this machine that agrees with its simulation",
        "--weights qat.safetensors DATA --output deploy",
    ),
    "compile": Verb("model2trt", "build a TensorRT plan from an ONNX file (model2trt.py)", "int8.onnx --max-batch 64"),
    "classify": Verb(
        "classify", "name what is in images (classify.py)", "--pretrained-from-file int8.onnx --image cat.jpg"
    ),
    "predict": Verb(
        "predict",
        "classify all images of a folder or of tars, resumably",
        "SOURCE --engine deploy.json --output answers",
    ),
    "verify": Verb(
        "verify",
        "compare an engine with its simulation on real images",
        "DATA --model qat.safetensors --engine int8.onnx",
    ),
    "sensitivity": Verb(
        "sensitivity", "tell which layers lose most by quantization", "DATA --model ptq.safetensors --plot layers.svg"
    ),
    "latency": Verb("latency", "time engines in turns", "fp32.onnx int8.onnx int8.onnx@openvino --batch-sizes 1 32"),
    "data": Verb("data", "count, check and pack the images of a data set", "DATA --check"),
    "models": Verb("models", "list the networks", "'efficientnet-*'"),
    "serve": Verb(
        "serve", "serve an engine over HTTP and gRPC, or fill Triton's model repository", "deploy/deploy.json"
    ),
    "launch": Verb(
        "launch",
        "train or quantize with a recipe's values (launch.py)",
        "--model efficientnet-b0 --mode convergence --platform H100 --precision AMP DATA",
    ),
    "demo": Verb("demo", "do all of it on handwritten digits, from the repository's root", "--workspace runs/demo"),
    "completion": Verb("completion", "print a script with which bash or zsh completes all this", "bash"),
}


def main() -> None:
    """Entry point of ``effnet-quant`` and of ``python -m effnet_quant``: run the verb's module."""
    path, *words = sys.argv
    program = os.path.basename(path)
    if program == "__main__.py":
        program = "python -m effnet_quant"
    if not words:
        print(_help(program), file=sys.stderr)
        sys.exit(2)
    verb, *arguments = words
    if verb in ("-h", "--help"):
        try:
            print(_help(program), flush=True)
        except BrokenPipeError:
            sys.exit(reader_left())
    elif verb == "--version":
        print(f"effnet-quant {__version__}")
    elif verb in VERBS:
        # the module sees the command line of a script, whose name is what the user typed
        sys.argv = [f"{program} {verb}", *arguments]
        importlib.import_module(f"effnet_quant.cli.{VERBS[verb].module}").main()
    else:
        near = difflib.get_close_matches(verb, VERBS)
        hint = f"did you mean: {', '.join(near)}?" if near else f"{program} -h lists them."
        print(f"error: there is no verb '{verb}'; {hint}", file=sys.stderr)
        sys.exit(2)


# the scripts whose verbs do more than they
_OF_SCRIPTS = {
    "main.py": "DATA --arch efficientnet-b0 --epochs 90",
    "quant_main.py": "DATA --arch efficientnet-quant-b0 --pretrained-from-file fp32.safetensors",
}


def example_of(command: str) -> str | None:
    """The example for the end of a command's help. ``command`` is as the user typed it: "effnet-quant verify", "main.py"."""
    name = command.rpartition(" ")[2]
    if name in _OF_SCRIPTS:
        return f"example:\n  python {command} {_OF_SCRIPTS[name]}"
    for verb_name, verb in VERBS.items():
        if name == verb_name:
            return f"example:\n  {command} {verb.example}"
        if name == f"{verb.module}.py":
            return f"example:\n  python {command} {verb.example}"
    return None


def _help(program: str) -> str:
    lines = [
        f"usage: {program} VERB [ARGUMENTS]",
        "",
        "Take a network from training to a verified 8-bit engine.",
        "",
        "verbs:",
    ]
    for name, verb in VERBS.items():
        lines += [f"  {name:<13}{verb.summary}", f"  {'':<10}  {program} {name} {verb.example}"]
    lines += [
        "",
        "options:",
        "  -h, --help  show this list; after a verb: show its flags",
        "  --version   show the version",
    ]
    return "\n".join(lines)
