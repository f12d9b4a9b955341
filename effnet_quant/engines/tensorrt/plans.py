"""compile_engine: builds a plan of an ONNX file, once for each model, card, TensorRT version and options."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from effnet_quant.card import ModelCard
from effnet_quant.engines.onnx_file import checked_metadata, read_onnx
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.engines.tensorrt import library
from effnet_quant.engines.tensorrt.build_options import BuildOptions, Machine, plan_key
from effnet_quant.engines.tensorrt.inspector import LayerPrecision, read_layers
from effnet_quant.errors import UserError
from effnet_quant.files import cache_folder, check_writable, create_folder, replace_file


@dataclass(frozen=True)
class Plan:
    """A plan's file, and its description in ``<file>.json``.

    Attributes:
        path: the plan itself, as TensorRT and Triton take it.
        sha256: of the plan's bytes.
        machine: the CUDA card and the TensorRT version of the build.
        options: what it was built for.
        signature: inputs and outputs.
        card: of the ONNX file.
        metadata: of the ONNX file, as plain values.
        layers: TensorRT's report on its layers.
    """

    path: Path
    sha256: str
    machine: Machine
    options: BuildOptions
    signature: Signature
    card: ModelCard
    metadata: dict[str, Any]
    layers: list[LayerPrecision]

    @property
    def input(self) -> ArrayInput:
        """The first input."""
        return self.signature.inputs[0]


def compile_engine(
    onnx_path: str | Path,
    output: str | Path | None = None,
    options: BuildOptions | None = None,
    *,
    timing_cache: str | Path | None = None,
) -> Plan:
    """Build a TensorRT plan from an ONNX file. It is strongly typed: the graph decides on every precision.

    Plans are cached in ``$XDG_CACHE_HOME/effnet-quant/tensorrt`` (``~/.cache/…``). The cache is used if file, card, TensorRT
    version and options are the same.

    Args:
        onnx_path: a file that ``export_onnx`` wrote for the target "tensorrt".
        output: the plan's file; its description becomes ``<output>.json``. None leaves both in the cache only.
        options: what it is built for.
        timing_cache: file of layer timings, read if it exists and then updated. None for a file in the cache, one for each
            card and version.

    Raises:
        UserError: TensorRT or a card is missing, the ONNX file is damaged or refused, or a file can't be written.
    """
    onnx_path, options = Path(onnx_path), options or BuildOptions()
    file = read_onnx(onnx_path)
    inputs = file.signature.inputs
    if any(None in value.shape for value in inputs) and options.image_size is None:
        options = replace(options, image_size=file.metadata.get("image_size"))  # what the network was made for
    made_for = file.card.target or "tensorrt"
    if file.quantized and made_for != "tensorrt":
        raise UserError(
            f"{onnx_path} is quantized for {made_for}, in numbers that TensorRT does not compute with; export it with "
            "--target tensorrt."
        )
    if output is not None:
        check_writable(Path(output))
    trt = library.import_tensorrt()
    machine = library.this_machine(trt)
    model = onnx_path.read_bytes()
    plans = create_folder(cache_folder() / "tensorrt", "XDG_CACHE_HOME")
    kept = plans / f"{plan_key(model, machine, options)}.plan"
    plan = find_plan(kept)
    if plan is None:
        timings = plans / timings_name(machine) if timing_cache is None else Path(timing_cache)
        check_writable(timings)
        measured = timings.read_bytes() if timings.is_file() else b""
        content, measured = library.build_plan(trt, model, inputs, options, measured)
        replace_file(timings, measured)
        try:
            loaded = library.load_plan(trt, content, options.version_compatible)
        except UserError as error:
            raise UserError(f"TensorRT {machine.tensorrt} can't load the plan that it built: {error}") from error
        layers = read_layers(library.inspect(trt, loaded, inputs, options))
        takes = replace(file.signature, inputs=tuple(with_profile(value, options) for value in inputs))
        digest = hashlib.sha256(content).hexdigest()
        plan = Plan(kept, digest, machine, options, takes, file.card, file.metadata, layers)
        write_plan(plan, content)
    if output is None:
        return plan
    given = replace(plan, path=Path(output))
    write_plan(given, kept.read_bytes())
    return given


def with_profile(value: ArrayInput, options: BuildOptions) -> ArrayInput:
    """The input of a plan: sizes that the ONNX file leaves open come from the options."""
    shape = tuple(options.image_size if size is None else size for size in value.shape)
    if value.largest_batch is not None:
        return replace(value, shape=shape)
    return replace(value, shape=shape, smallest_batch=options.smallest_batch, largest_batch=options.largest_batch)


def write_plan(plan: Plan, content: bytes) -> None:
    """Write the description, then the plan, so that an existing plan always has a complete description."""
    described = {
        "sha256": plan.sha256,
        "machine": asdict(plan.machine),
        "options": plan.options.to_json(),
        **plan.signature.to_json(),
        "card": plan.card.to_json(),
        "metadata": plan.metadata,
        "layers": [asdict(layer) for layer in plan.layers],
    }
    replace_file(_description(plan.path), json.dumps(described, indent=1).encode())
    replace_file(plan.path, content)


def find_plan(path: Path) -> Plan | None:
    """The plan at ``path`` with its description; None if one is missing or they do not match."""
    if not path.is_file() or not _description(path).is_file():
        return None
    try:
        values = json.loads(_description(path).read_text(encoding="utf-8"))
        plan = Plan(
            path,
            values["sha256"],
            Machine(**values["machine"]),
            BuildOptions(**values["options"]),
            Signature.from_json(values) if "inputs" in values else _one_image(values),
            ModelCard.from_json(values.get("card", {}), str(_description(path))),
            checked_metadata(values["metadata"]),
            [
                LayerPrecision(**{**layer, "inputs": tuple(layer["inputs"]), "outputs": tuple(layer["outputs"])})
                for layer in values["layers"]
            ],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return plan if hashlib.sha256(path.read_bytes()).hexdigest() == plan.sha256 else None


def _one_image(values: dict[str, Any]) -> Signature:
    """The signature in a description of an earlier version, which had a single input."""
    image = ArrayInput(**{**values["input"], "shape": tuple(values["input"]["shape"])})
    return Signature((image,), (ArrayOutput(values["output"], "float32"),))


def discard_plan(plan: Plan) -> None:
    """Remove a plan and its description."""
    for path in (plan.path, _description(plan.path)):
        path.unlink(missing_ok=True)


def timings_name(machine: Machine) -> str:
    """The timing cache's file name. Timings are valid for one card and one version."""
    return re.sub(r"[^\w.]+", "-", f"{machine.card}-{machine.tensorrt}") + ".timings"


def _description(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
