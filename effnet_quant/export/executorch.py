"""ExecuTorch export: a .pte file whose operations XNNPACK computes."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_quant.card import CARD_KEY, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.export.executorch_writer import ExecutorchWriter
from effnet_quant.export.options import ExportOptions
from effnet_quant.export.passes import run_passes
from effnet_quant.export.signature import output_names, structure_to_json
from effnet_quant.export.tracing import quiet, trace_image
from effnet_quant.files import check_writable, replace_file
from effnet_quant.models.input_channels import image_channels
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.targets import Target, get_target
from effnet_quant.saved_model import card_of
from effnet_quant.tasks import get_task

_PLAIN = ExportOptions()


def export_executorch(
    model: nn.Module,
    path: str | Path,
    image_size: int,
    *,
    target: str | Target = "executorch",
    card: ModelCard | None = None,
) -> dict[str, int]:
    """Write ``model`` as an ExecuTorch program for XNNPACK, which takes one image at a time.

    The method "forward" takes float32 (1, C, image_size, image_size). ``load_engine`` splits larger batches. The method
    "effnet_quant" returns the card and the signature.

    Args:
        model: a float or calibrated quantized model of images; left untouched.
        path: the .pte file; replaced only when the new one is complete.
        image_size: height and width of the images, in pixels.
        target: "executorch", or changed rules of it (``Target.leaving_in_float``).
        card: describes the model; None for what ``create_model`` and ``quantize`` know.

    Returns:
        What XNNPACK's partitioner leaves out: from the name of an operation to how often it is there. ExecuTorch's portable
        kernels compute it, slowly.

    Raises:
        UserError: ExecuTorch is missing or refuses the graph, or a quantizer has no range.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    except ImportError as error:
        raise UserError("ExecuTorch is not installed; pip install effnet-quant[executorch].") from error
    path = Path(path)
    check_writable(path)
    rules = get_target(target)
    if rules.suffix != ".pte":
        raise UserError(f"{rules.name} reads {rules.suffix} files, not ExecuTorch's; take export_onnx.")
    channels = image_channels(model, image_size)
    traced = run_passes(trace_image(model, rules, image_size, channels), rules, _PLAIN)
    if card is None:
        card = card_of(model)
        if card.input is not None:
            card = replace(card, input=card.input.resized(image_size) if card.input.channels == channels else None)
    left = tuple(sorted(get_target(rules.name).quantized - rules.quantized))
    card = replace(card, target=rules.name, float_operations=left)
    example = torch.zeros(1, channels, image_size, image_size)
    names = output_names(traced, get_task(card.task).output_names)
    description = {
        CARD_KEY: card.to_json(),
        "image_size": image_size,
        "quantized": any(True for _ in quantizers(model)) and bool(rules.quantized),
        "signature": {
            "inputs": [{"name": "input", "dtype": "float32", "shape": list(example.shape[1:])}],
            "outputs": [
                {"name": name, "dtype": str(node.meta["val"].dtype).removeprefix("torch.")}
                for name, node in zip(names, traced.outputs, strict=True)
            ],
            "structure": structure_to_json(traced.structure),
        },
    }
    text = torch.frombuffer(bytearray(json.dumps(description, sort_keys=True).encode()), dtype=torch.uint8)
    module = ExecutorchWriter(traced).run()
    try:
        with torch.no_grad(), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (example,), strict=False)
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={CARD_KEY: text},
            )
            left_out = _left_out(lowered.exported_program().graph_module.graph)
            content = lowered.to_executorch().buffer
    except Exception as error:  # whatever ExecuTorch's many passes raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"ExecuTorch can't take the model: {reason:.300}") from error
    replace_file(path, content)
    return left_out


def _left_out(graph: Any) -> dict[str, int]:
    """The operations outside of XNNPACK's parts."""
    names = [
        node.target.name() if hasattr(node.target, "name") else node.target.__name__
        for node in graph.nodes
        if node.op == "call_function"
    ]
    own = ("getitem", "executorch_call_delegate")
    return dict(Counter(name for name in names if name not in own))
