"""effnet-quant serve: put an engine into a model repository of Triton Inference Server."""

from __future__ import annotations

from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.engines import usual_backend
from effnet_quant.cli.process import run
from effnet_quant.engines.deployment import is_deployment, read_deployment
from effnet_quant.files import existing_file
from effnet_quant.serving.settings import FILE_NAMES, MAX_BATCH, QUEUE_DELAY_US, Serving
from effnet_quant.terminal import printable, shell_word


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Put an engine into a model repository of Triton Inference Server.")
    add = parser.add_argument
    add("engine", metavar="ENGINE", help="an ONNX file, a plan of model2trt.py, or a deploy.json")
    add("repository", metavar="REPOSITORY", help="the folder of the model repository")
    add(
        "--backend",
        choices=tuple(FILE_NAMES),
        help="default: onnxruntime for .onnx, tensorrt for .plan, deploy.json's own",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda for tensorrt, else cpu")
    add("--name", help="name of the model (default: the file's)")
    add("--version", type=int, help="number of the version (default: the next)")
    add("--instances", type=int, default=1, help="copies that run at the same time")
    add(
        "--max-batch",
        type=int,
        help=f"most images in a batch (default: {MAX_BATCH}, or the most that a plan was built for)",
    )
    add(
        "--queue-delay",
        type=int,
        metavar="MICROSECONDS",
        help=f"how long a request may wait for others to fill a batch (default: {QUEUE_DELAY_US})",
    )
    return parser


def job(arguments: Sequence[str]) -> int:
    """Write the model as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    from effnet_quant.serving.triton_repository import write_model

    existing_file(parsed.engine)
    backend = parsed.backend or usual_backend(parsed.engine)
    path = read_deployment(parsed.engine)[1] if is_deployment(parsed.engine) else parsed.engine
    device = parsed.device or ("cuda" if backend == "tensorrt" else "cpu")
    serving = Serving(backend, device, parsed.instances, parsed.max_batch, parsed.queue_delay)
    folder = write_model(path, parsed.repository, serving, name=parsed.name, version=parsed.version)
    start = f"tritonserver --model-repository={shell_word(parsed.repository)}"
    print(printable(f"{folder}: served by {backend} on the device {device}; start: {start}"))
    return 0


def main() -> None:
    """Entry point of ``effnet-quant serve``."""
    run(job)
