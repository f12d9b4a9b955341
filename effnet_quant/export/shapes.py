"""Operations that move or repeat values: padding, reshaping, concatenation, slices, resizing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx

from effnet_quant.errors import UserError
from effnet_quant.export.operation import Emit, Operation, rank
from effnet_quant.export.traced_graph import shape_of

aten = torch.ops.aten


def pad(op: Operation) -> str:
    """Pad with constant, reflected or replicated values."""
    amounts = list(op["pad"])
    mode = op["mode"] if op.node.target is aten.pad.default else "constant"
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        raise op.refuse(f"with mode {mode} can't be exported")
    if not all(isinstance(amount, int) for amount in amounts):
        raise op.refuse("by amounts that depend on the images' size can't be exported; leave their size fixed")
    dims = rank(op.node.args[0])
    begins, ends = [0] * dims, [0] * dims
    for index in range(len(amounts) // 2):  # PyTorch lists the last dimension first
        begins[dims - 1 - index], ends[dims - 1 - index] = amounts[2 * index], amounts[2 * index + 1]
    inputs = [op.x, op.integers("pads", begins + ends)]
    if mode == "constant":
        inputs.append(op.tensor(float(op["value"] or 0.0)))
    return op.emit("Pad", *inputs, mode=modes[mode])


def reshape(op: Operation) -> str:
    """Reshape. Only the batch is open, so the traced result has all other sizes as numbers."""
    sizes = [size if isinstance(size, int) else -1 for size in shape_of(op.node)]
    if sizes.count(-1) > 1:
        raise op.refuse("to a shape with two unknown sizes can't be exported")
    return op.emit("Reshape", op.x, op.integers("shape", sizes))


def flatten(op: Operation) -> str:
    """ONNX's Flatten if it starts at the second dimension, as before a classifier; else Reshape."""
    if op.node.args[1:] in ((1,), (1, -1)):
        return op.emit("Flatten", op.x, axis=1)
    return reshape(op)


def unsqueeze(op: Operation) -> str:
    """Insert a dimension of size 1."""
    return op.emit("Unsqueeze", op.x, op.integers("axes", [op["dim"]]))


def expand(op: Operation) -> str:
    """Repeat along dimensions of size 1.

    ONNX's Expand keeps a dimension where the wanted size is 1. So an open batch is written as 1, unless the batch itself is
    repeated.
    """
    own, wanted = shape_of(op.node.args[0]), shape_of(op.node)
    given = [*([1] * (len(wanted) - len(own))), *own]
    if any(isinstance(new, torch.SymInt) and old == 1 for old, new in zip(given, wanted, strict=True)):
        return op.emit("Expand", op.x, _sizes(op))
    if all(old == new for old, new in zip(given, wanted, strict=True)):
        return op.x
    sizes = [size if isinstance(size, int) else 1 for size in wanted]
    return op.emit("Expand", op.x, op.integers("shape", sizes))


def _sizes(op: Operation) -> str:
    """The sizes that ``expand`` asks for. Open sizes are read from the tensor that they come from."""
    if op.node.target is aten.expand_as.default:
        return op.emit("Shape", op.tensor(op["other"]))
    parts = [_size(op, *entry) for entry in zip(op["size"], shape_of(op.node), strict=True)]
    return op.emit("Concat", *parts, axis=0)


def _size(op: Operation, asked: object, size: int | torch.SymInt) -> str:
    """One size that an operation asks for: a constant, or read from the tensor that it comes from."""
    if isinstance(size, int):
        return op.integers("size", [size])
    if isinstance(asked, fx.Node) and asked.target is aten.sym_size.int:
        source, axis = asked.args
        return op.emit("Shape", op.tensor(source), start=axis, end=axis + 1)  # type: ignore[operator]
    found = next(_as_large(op, size), None)
    if found is None:
        raise op.refuse("to a computed size can't be exported")
    return op.emit("Shape", found[0], start=found[1], end=found[1] + 1)


def _as_large(op: Operation, size: torch.SymInt) -> Iterator[tuple[str, int]]:
    """Names of earlier values that always have this size, and the axis that has it."""
    for node in op.node.graph.nodes:
        if node is op.node:
            return
        value = node.meta.get("val")
        for axis, own in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            # compare expressions: comparing the sizes would bind them to numbers
            if isinstance(own, torch.SymInt) and own.node.expr == size.node.expr:
                with contextlib.suppress(UserError):  # it is not written
                    yield op.tensor(node), axis


def repeat(op: Operation) -> str:
    """Repeat the tensor along every dimension."""
    times = list(op["repeats"])
    if not all(isinstance(count, int) for count in times):
        raise op.refuse("by a computed number can't be exported")
    missing = len(times) - rank(op.node.args[0])
    x = op.emit("Unsqueeze", op.x, op.integers("axes", list(range(missing)))) if missing else op.x
    return op.emit("Tile", x, op.integers("repeats", times))


def permute(op: Operation) -> str:
    """Permute dimensions."""
    dims = rank(op.node.args[0])
    return op.emit("Transpose", op.x, perm=[dim % dims for dim in op["dims"]])


def transpose(op: Operation) -> str:
    """Swap two dimensions."""
    dims = rank(op.node.args[0])
    order = list(range(dims))
    first, second = op["dim0"] % dims, op["dim1"] % dims
    order[first], order[second] = second, first
    return op.emit("Transpose", op.x, perm=order)


def transpose_matrix(op: Operation) -> str:
    """``x.t()``."""
    return op.emit("Transpose", op.x, perm=list(reversed(range(rank(op.node.args[0])))))


def concat(op: Operation) -> str:
    """Concatenate along an existing dimension."""
    names = [op.tensor(value) for value in op["tensors"]]
    return names[0] if len(names) == 1 else op.emit("Concat", *names, axis=op["dim"])


def stack(op: Operation) -> str:
    """Stack along a new dimension."""
    axis = op["dim"] % rank(op.node)
    parts = [op.emit("Unsqueeze", op.tensor(value), op.integers("axes", [axis])) for value in op["tensors"]]
    return op.emit("Concat", *parts, axis=axis)


def slice_(op: Operation) -> str:
    """Slice one dimension between fixed positions."""
    axis, length = op["dim"], shape_of(op.node.args[0])[op["dim"]]
    start, stop, step = op["start"] or 0, op["end"], op["step"]
    if start == 0 and step == 1 and (stop is None or (not isinstance(stop, fx.Node) and _covers(stop, length))):
        return op.x
    if isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        raise op.refuse("at positions that depend on the data can't be exported")
    stop = np.iinfo(np.int64).max if stop is None else stop
    bounds = [op.integers(name, [value]) for name, value in (("starts", start), ("ends", stop), ("axes", axis))]
    return op.emit("Slice", op.x, *bounds, op.integers("steps", [step]))


def _covers(stop: int, length: int | torch.SymInt) -> bool:
    return stop == np.iinfo(np.int64).max or (isinstance(length, int) and stop >= length)


def split(op: Operation) -> list[str]:
    """chunk and split: one Split node, whose outputs ``getitem`` takes."""
    parts = [value.shape for value in op.node.meta["val"]]
    axis = op["dim"] % rank(op.node.args[0])
    op.sizes(op.node.args[0], axis)
    sizes = op.integers("split", [int(shape[axis]) for shape in parts])
    return op.writer.node_with_outputs("Split", [op.x, sizes], op.path, len(parts), axis=axis)


def unbind(op: Operation) -> list[str]:
    """Split a dimension into tensors without it."""
    axis = op["dim"] % rank(op.node.args[0])
    return [_gather(op, index, axis) for index in range(len(op.node.meta["val"]))]


def select(op: Operation) -> str:
    """Take one index of a dimension and remove the dimension."""
    return _gather(op, op["index"], op["dim"])


def _gather(op: Operation, index: int, axis: int) -> str:
    return op.emit("Gather", op.x, op.writer.constant(f"{op.path}.index", np.array(index, np.int64)), axis=axis)


def index(op: Operation) -> str:
    """Gather constant positions of one dimension."""
    chosen = [(axis, positions) for axis, positions in enumerate(op["indices"]) if positions is not None]
    if len(chosen) != 1 or rank(chosen[0][1]) != 1 or chosen[0][1].meta["val"].dtype == torch.bool:
        raise op.refuse("by anything but positions in one dimension can't be exported")
    axis, positions = chosen[0]
    return op.emit("Gather", op.x, op.tensor(positions), axis=axis)


def roll(op: Operation) -> str:
    """Roll values along dimensions, around the end."""
    x = op.x
    for shift, axis in zip(op["shifts"], op["dims"], strict=True):
        (length,) = op.sizes(op.node, axis)
        if shift % length:
            cut = length - shift % length
            ends = [_part(op, x, axis, cut, length), _part(op, x, axis, 0, cut)]
            x = op.emit("Concat", *ends, axis=axis)
    return x


def _part(op: Operation, x: str, axis: int, start: int, stop: int) -> str:
    bounds = [op.integers(name, [value]) for name, value in (("starts", start), ("ends", stop), ("axes", axis))]
    return op.emit("Slice", x, *bounds)


def pixel_shuffle(op: Operation) -> str:
    """Channels to pixels: (C * r * r, H, W) -> (C, H * r, W * r)."""
    return op.emit("DepthToSpace", op.x, blocksize=op["upscale_factor"], mode="CRD")


def pixel_unshuffle(op: Operation) -> str:
    """Pixels to channels: (C, H * r, W * r) -> (C * r * r, H, W). SpaceToDepth lists the channels in another order."""
    factor = op["downscale_factor"]
    channels, height, width = op.sizes(op.node.args[0], 1, 2, 3)
    blocks = op.integers("blocks", [-1, channels, height // factor, factor, width // factor, factor])
    moved = op.emit("Transpose", op.emit("Reshape", op.x, blocks), perm=[0, 1, 3, 5, 2, 4])
    return op.emit("Reshape", moved, op.integers("shape", [-1, *op.sizes(op.node, 1, 2, 3)]))


def resize(mode: str) -> Emit:
    """Nearest or bilinear interpolation."""

    def emit(op: Operation) -> str:
        if mode == "nearest":
            settings = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        else:
            corners = "align_corners" if op["align_corners"] else "half_pixel"
            settings = {"coordinate_transformation_mode": corners}
        factors = op["scale_factors"]
        if factors is not None and all(float(factor).is_integer() for factor in factors):
            # always float32, also in a graph of float16 numbers
            scales = op.writer.constant(f"{op.path}.scales", np.array([1, 1, *factors], np.float32), half=False)
            return op.emit("Resize", op.x, "", scales, mode=mode, **settings)
        # sizes, not their ratio: as a float32 that may end one pixel short
        kept = op.emit("Shape", op.x, start=0, end=2)
        wanted = op["output_size"] or (None, None)
        sizes = [_size(op, *entry) for entry in zip(wanted, shape_of(op.node)[-2:], strict=True)]
        return op.emit("Resize", op.x, "", "", op.emit("Concat", kept, *sizes, axis=0), mode=mode, **settings)

    return emit
