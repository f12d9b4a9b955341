"""Learns the rounding of a network's weights, block after block. A killed run goes on with the block it was at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.files import create_folder, replace_file
from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.ptq.block_learning import Learning, learn_block
from effnet_quant.quantization.ptq.block_walk import Stop, walk_blocks
from effnet_quant.quantization.ptq.step import StepContext, batches_on, checked_batches
from effnet_quant.quantization.quantizer import TensorQuantizer

_RUN_SIZE = 16  # examples that run through a block at a time


def learn_rounding(
    model: nn.Module, batches: Sequence[Batch], context: StepContext, learning: Learning, *, single_layers: bool
) -> None:
    """Learn the rounding of all blocks of ``model``, in place.

    Two copies of all examples go through the network block by block, one through the float network and one through the
    quantized network. Each block learns to turn the second into what the float network gives.

    Args:
        model: a quantized model with ranges.
        batches: calibration examples.
        context: with a folder, each finished block is kept there. The same call goes on after the last finished block,
            and gives the same weights as a call that was not interrupted.
        learning: how a block learns.
        single_layers: learn layer by layer.

    Raises:
        UserError: no ranges, fewer than two examples, a batch that is no good, a model that can't be cut, or a full disk.
    """
    batches = checked_batches(model, batches)
    if not any(quantizer.enabled for _, quantizer in quantizers(model)):
        raise UserError("the model has no ranges yet; call calibrate(model, batches) first.")
    title = "layers rounded" if single_layers else "blocks reconstructed"
    kept = None if context.folder is None else _folder(model, batches, context, learning, single_layers)
    walk = walk_blocks(model, batches, context, title, single_layers=single_layers, run_size=_RUN_SIZE)
    with closing(walk) as stops:
        for stop in stops:
            file = None if kept is None else kept / f"block-{stop.number:03}.safetensors"
            if file is not None and file.is_file():
                _load(stop, file)
                continue
            generator = torch.Generator().manual_seed(context.seed * 1_000_003 + stop.number)
            learn_block(model, stop, learning, generator)
            if not learning.range_rate:  # else the block has learned them
                _track_outputs(stop)
            if file is not None:
                _save(stop, file)


def _track_outputs(stop: Stop) -> None:
    """Give the block's output quantizers the ranges that its new weights need."""
    outputs = [quantizer for quantizer in stop.block.quantizers("output") if quantizer.enabled]
    if not outputs:
        return
    try:
        for quantizer in outputs:
            quantizer.start_tracking()
        stop.given()
    finally:
        for quantizer in outputs:
            quantizer.stop_tracking()


def _learned(stop: Stop) -> dict[str, Tensor]:
    """All that learning may have changed, numbered in the order of the block's modules."""
    tensors: list[Tensor] = [*stop.block.module.parameters()]
    for quantizer in chain.from_iterable(stop.activations):
        tensors += [end for end in (quantizer.lower, quantizer.upper) if end is not None]
    return {str(number): tensor.detach() for number, tensor in enumerate(tensors)}


def _save(stop: Stop, file: Path) -> None:
    replace_file(file, save({number: tensor.cpu().contiguous() for number, tensor in _learned(stop).items()}))


def _load(stop: Stop, file: Path) -> None:
    saved = load_file(file)
    for number, tensor in _learned(stop).items():
        tensor.copy_(saved[number])


def _folder(
    model: nn.Module, batches: Sequence[Batch], context: StepContext, learning: Learning, single_layers: bool
) -> Path:
    """The folder of the finished blocks of just this call: its name is a hash of all that decides the result."""
    assert context.folder is not None
    digest = hashlib.sha256(repr((learning, single_layers, context.seed)).encode())
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            digest.update(repr((module.spec, module.simulated, module.enabled)).encode())
    tensors = [*model.state_dict().values()]
    for arguments, _ in batches_on(model, batches):
        tensors += [value for value in arguments if isinstance(value, Tensor)]
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return create_folder(context.folder / f"blocks-{digest.hexdigest()[:16]}", "the folder of ptq")
