"""effnet-quant serve: serve an engine here, or put it into a model repository of Triton Inference Server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.engines import usual_backend
from effnet_quant.cli.process import run
from effnet_quant.engines.deployment import is_deployment, read_deployment
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file
from effnet_quant.serving.ports import check_port
from effnet_quant.serving.settings import MAX_BATCH, QUEUE_DELAY_US, Serving
from effnet_quant.terminal import printable, shell_word

HTTP_PORT, GRPC_PORT = 8080, 8081


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Serve an engine over HTTP and gRPC, or put it into a model repository of Triton Inference Server.")
    add = parser.add_argument
    add("engine", metavar="ENGINE", help="an ONNX file, a plan of model2trt.py, or a deploy.json")
    add(
        "repository",
        metavar="REPOSITORY",
        nargs="?",
        help="the folder of Triton's model repository; serve here if none",
    )
    add(
        "--backend",
        help="default: onnxruntime for .onnx, tensorrt for .plan, deploy.json's own",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda for tensorrt, else cpu")
    add("--name", help="name of the model (default: the file's)")
    add("--http-port", type=int, help=f"for HTTP and the metrics, without a REPOSITORY (default: {HTTP_PORT})")
    add("--grpc-port", type=int, help=f"for gRPC, without a REPOSITORY (default: {GRPC_PORT})")
    add("--version", type=int, help="Triton: number of the version (default: the next)")
    add("--instances", type=int, help="Triton: copies that run at the same time (default: 1)")
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
    """Serve, or write the model, as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    existing_file(parsed.engine)
    if parsed.repository is None:
        return _serve_here(parsed)
    _refuse(parsed, ("http_port", "grpc_port"), "is for serving here; leave REPOSITORY out")
    from effnet_quant.serving.triton_repository import write_model

    backend = parsed.backend or usual_backend(parsed.engine)
    path = read_deployment(parsed.engine)[1] if is_deployment(parsed.engine) else parsed.engine
    device = parsed.device or ("cuda" if backend == "tensorrt" else "cpu")
    instances = 1 if parsed.instances is None else parsed.instances
    serving = Serving(backend, device, instances, parsed.max_batch, parsed.queue_delay)
    folder = write_model(path, parsed.repository, serving, name=parsed.name, version=parsed.version)
    start = f"tritonserver --model-repository={shell_word(parsed.repository)}"
    print(printable(f"{folder}: served by {backend} on the device {device}; start: {start}"))
    return 0


def _serve_here(parsed: argparse.Namespace) -> int:
    _refuse(parsed, ("version", "instances"), "is for Triton; name a REPOSITORY")
    http_port = HTTP_PORT if parsed.http_port is None else parsed.http_port
    grpc_port = GRPC_PORT if parsed.grpc_port is None else parsed.grpc_port
    if http_port == grpc_port:
        raise UserError("HTTP and gRPC need ports of their own; change --http-port or --grpc-port.")
    check_port(http_port, "--http-port")
    check_port(grpc_port, "--grpc-port")
    from effnet_quant.engines.engine import load_engine

    backend = parsed.backend or usual_backend(parsed.engine)
    engine = load_engine(parsed.engine, backend, device=parsed.device)
    try:
        from effnet_quant.serving.open_inference import serve
    except ImportError as error:
        raise UserError(f"serving needs KServe ({error}); pip install 'effnet-quant[serve]'.") from error
    print(printable(f"{engine} on the ports {http_port} (HTTP, /metrics) and {grpc_port} (gRPC)"), flush=True)
    serve(
        engine,
        name=parsed.name,
        http_port=http_port,
        grpc_port=grpc_port,
        max_batch=MAX_BATCH if parsed.max_batch is None else parsed.max_batch,
        queue_delay_us=QUEUE_DELAY_US if parsed.queue_delay is None else parsed.queue_delay,
    )
    return 0


def _refuse(parsed: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(parsed, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {why}.")


def main() -> None:
    """Entry point of ``effnet-quant serve``."""
    run(job)
