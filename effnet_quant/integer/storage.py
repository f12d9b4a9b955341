"""The file of an integer program: an ONNX model whose metadata lists the steps. The graph holds their arrays."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from effnet_quant.errors import UserError
from effnet_quant.integer.onnx_graph import OPSET, float_tensors, write_graph
from effnet_quant.integer.program import STEPS, Program, Rescale, Step

PROGRAM_KEY = "effnet_quant.integer"
VERSION = 1
# arrays of a step that the graph holds, and the names of their constants behind the step's own
_STORED = {"table": "table", "weight": "weight", "bias": "bias", "multipliers": "multiplier"}
_SHAPED = ("bias",)  # stored in another shape, (O, 1, 1), for convolutions


def to_model(program: Program) -> onnx.ModelProto:
    """The ONNX model of a program, with the program in its metadata. No tensor in it has a floating-point type.

    Raises:
        ValueError: a step breaks a rule.
    """
    graph = write_graph(program)
    floats = float_tensors(graph)
    assert not floats, f"{floats} are floats"
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    steps = [_to_json(step) for step in program.steps]
    values = {
        "version": VERSION,
        "image": list(program.image),
        "dimensions": program.dimensions,
        "scale": program.scale,
        "steps": steps,
    }
    helper.set_model_props(model, {PROGRAM_KEY: json.dumps(values, sort_keys=True)})
    return model


def _to_json(step: Step) -> dict[str, Any]:
    values: dict[str, Any] = {"step": type(step).__name__}
    for entry in fields(step):
        value = getattr(step, entry.name)
        if entry.name in _STORED:
            continue
        if isinstance(value, np.ndarray):
            value = value.tolist()
        elif isinstance(value, tuple):
            value = list(value)
        # a Sum's multipliers are plain numbers beside its operands
        values[entry.name] = dict(value) if entry.name == "proof" else value
    if type(step).__name__ == "Sum":
        values["multipliers"] = list(getattr(step, "multipliers"))  # noqa: B009
    return values


def from_model(model: onnx.ModelProto, source: str) -> Program:
    """The program of a file, after a check of every rule, and that the graph computes this program.

    Raises:
        UserError: the file holds no program, breaks a rule, or its graph is another.
    """
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if PROGRAM_KEY not in properties:
        raise UserError(
            f"{source} holds no integer program with its proofs; export it with --target integer or export_integer."
        )
    try:
        program = _program(json.loads(properties[PROGRAM_KEY]), model.graph)
        program.check()
    except ValueError as error:
        raise UserError(f"{source} breaks the rules of integer inference: {error}; export it again.") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"{source} holds no complete integer program ({error!r:.80}); export it again.") from error
    if different := _difference(write_graph(program), model.graph):
        raise UserError(
            f"{source} contradicts itself: its graph has another {different} than its steps; export it again."
        )
    return program


def _program(values: dict[str, Any], graph: onnx.GraphProto) -> Program:
    if values["version"] != VERSION:
        raise ValueError(f"its version is {values['version']!r:.20}, but this program reads version {VERSION}")
    constants = {entry.name: entry for entry in graph.initializer}
    steps = tuple(_step(entry, constants) for entry in values["steps"])
    channels, height, width = (_integer(size) for size in values["image"])
    return Program((channels, height, width), steps, float(values["scale"]), _integer(values["dimensions"]))


def _step(values: dict[str, Any], constants: dict[str, onnx.TensorProto]) -> Step:
    kind, output = STEPS[values["step"]], values["output"]
    given: dict[str, Any] = {}
    for entry in fields(kind):
        if entry.name in _STORED and entry.name not in values:
            name = f"{output}.{_STORED[entry.name]}"
            if name not in constants:
                raise ValueError(f"{output} has no {_STORED[entry.name]}")
            array = numpy_helper.to_array(constants[name])
            given[entry.name] = array.reshape(-1) if entry.name in _SHAPED else array
        elif entry.name == "proof":
            given[entry.name] = {str(key): _integer(value) for key, value in (values.get("proof") or {}).items()}
        elif kind is Rescale and entry.name == "shifts":
            given[entry.name] = _array(values["shifts"])
        else:
            given[entry.name] = _plain(values[entry.name])
    step: Step = kind(**given)
    return step


def _array(values: Any) -> NDArray[np.int64]:
    array = np.array(values)
    if array.dtype != np.int64:
        raise ValueError("its shifts are no integers")
    return array


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value if all(isinstance(entry, str) for entry in value) else map(_integer, value))
    return value if isinstance(value, str) else _integer(value)


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r:.40} stands where an integer belongs")
    return value


def _difference(expected: onnx.GraphProto, found: onnx.GraphProto) -> str | None:
    """What differs between two graphs: the name of the first node or constant, or None."""
    for kind in ("node", "initializer", "input", "output"):
        ours, theirs = getattr(expected, kind), getattr(found, kind)
        for own, other in zip(ours, theirs, strict=False):
            if own != other:
                return f"{kind} {own.name}"
        if len(ours) != len(theirs):
            return f"number of {kind}s"
    return None
