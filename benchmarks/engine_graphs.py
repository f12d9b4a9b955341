"""Claim: ONNX Runtime runs our INT8 graphs on integers from the images to the logits, like the graphs of its own tool.

Both graphs come from the same float weights (random) and calibration images (noise), as in engine_latency.py. ONNX Runtime
optimizes each. The table counts the remaining nodes by operator and by type of input (integer or float). Each
DequantizeLinear and QuantizeLinear costs a pass over memory that the float network does not have.

    python benchmarks/engine_graphs.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
from engine_latency import NETWORKS, model_and_images, write_ours, write_tools

from effnet_quant import export_onnx

IMAGE_SIZE = 224
ROUNDING = ("QuantizeLinear", "DequantizeLinear")
WHERE = ("on integers", "rounding and back", "in float")


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description="Operators of optimized INT8 graphs, ours and ONNX Runtime's tool's.")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    for network in parser.parse_args().networks:
        with tempfile.TemporaryDirectory() as folder:
            columns = count_operators(network, IMAGE_SIZE, Path(folder))
        print(f"| {network.removeprefix('timm:')} | {' | '.join(columns)} |")
        print("| --- " * (len(columns) + 1) + "|")
        for where in WHERE:
            print(f"| **{where}** | {' | '.join(f'**{count_where(counts, where)}**' for counts in columns.values())} |")
            for kind in sorted({kind for counts in columns.values() for kind, place in counts if place == where}):
                print(f"| {kind} | {' | '.join(str(counts[kind, where] or '') for counts in columns.values())} |")
        print(flush=True)


def count_where(counts: Counter[tuple[str, str]], where: str) -> int:
    """Nodes of all operators there, one of ``WHERE``."""
    return sum(count for (_, place), count in counts.items() if place == where)


def count_operators(network: str, image_size: int, folder: Path) -> dict[str, Counter[tuple[str, str]]]:
    """Nodes by operator and place (``WHERE``) that ONNX Runtime runs, for each file."""
    model, images = model_and_images(network, image_size)
    export_onnx(model, folder / "float.onnx", image_size)
    paths = write_tools(folder / "float.onnx", images, folder)
    ours = write_ours(model, images, folder)["onnxruntime"]
    columns = {"ours": ours, "tool u8": paths["u8"], "tool s8": paths["s8"], "float": folder / "float.onnx"}
    return {title: optimized_operators(path) for title, path in columns.items()}


def optimized_operators(path: Path) -> Counter[tuple[str, str]]:
    """Nodes by operator and place after ONNX Runtime has optimized a file for this machine."""
    optimized = path.with_suffix(".optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(optimized).graph
    integers: set[str] = (
        set()
    )  # the values that are; an operator's output is what its first input is, with the exceptions below
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.node:  # in the order in which they run
        on_integers = node.input[0] in integers
        where = WHERE[1] if node.op_type in ROUNDING else WHERE[0] if on_integers else WHERE[2]
        counts[node.op_type, where] += 1
        # a QGemm without a scale of its output (input 7) gives floats
        gives_floats = node.op_type == "DequantizeLinear" or (node.op_type == "QGemm" and len(node.input) < 8)
        if node.op_type == "QuantizeLinear" or (on_integers and not gives_floats):
            integers.update(node.output)
    return counts


if __name__ == "__main__":
    main()
