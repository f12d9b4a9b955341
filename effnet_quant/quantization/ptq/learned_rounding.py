"""Learns the rounding of a network's weights, block after block. A killed run goes on with the block it was at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.files import create_folder, replace_file
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.ptq.activations import ActivationStore, Cut, last_uses
from effnet_quant.quantization.ptq.block_learning import Learning, block_quantizers, learn_block
from effnet_quant.quantization.ptq.blocks import Block, cut_blocks
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
    device = device_of(model)
    blocks = cut_blocks(model, batches[0], single_layers=single_layers)
    kept = None if context.folder is None else _folder(model, batches, context, learning, single_layers)
    store, uses = ActivationStore(context.memory, context.folder), last_uses(blocks)
    floats, rounded = (Cut(store, _RUN_SIZE, uses) for _ in range(2))
    total = sum(examples for _, examples in batches_on(model, batches))
    floats.enter(_arguments(blocks), (arguments for arguments, _ in batches_on(model, batches)), total)
    rounded.values = dict(floats.values)
    with eager_pass(model):
        for number, block in enumerate(blocks):
            context.progress(title, number, len(blocks))
            with _in_float(block):
                wanted = floats.run(block, device)
            file = None if kept is None else kept / f"block-{number:03}.safetensors"
            if file is not None and file.is_file():
                _load(block, file)
            else:
                generator = torch.Generator().manual_seed(context.seed * 1_000_003 + number)
                learn_block(model, block, floats, rounded, wanted, learning, generator)
                if not learning.range_rate:  # else the block has learned them
                    _track_outputs(block, rounded, device)
                if file is not None:
                    _save(block, file)
            given = rounded.run(block, device)
            floats.advance(number, wanted)
            rounded.advance(number, given)
        context.progress(title, len(blocks), len(blocks))


def _arguments(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Names of the model's arguments, in order."""
    made: set[str] = set()
    found: list[str] = []
    for block in blocks:
        found += [name for name in block.inputs if name not in made and name not in found]
        made.update(block.outputs)
    return tuple(found)


@contextmanager
def _in_float(block: Block) -> Iterator[None]:
    """Within it the block's quantizers are off."""
    found = block_quantizers(block, "input", "weight", "output", "gate")
    before = [quantizer.enabled for quantizer in found]
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(found, before, strict=True):
            quantizer.enabled = enabled


def _track_outputs(block: Block, rounded: Cut, device: torch.device) -> None:
    """Give the block's output quantizers the ranges that its new weights need."""
    outputs = [quantizer for quantizer in block_quantizers(block, "output") if quantizer.enabled]
    if not outputs:
        return
    try:
        for quantizer in outputs:
            quantizer.start_tracking()
        rounded.run(block, device)
    finally:
        for quantizer in outputs:
            quantizer.stop_tracking()


def _learned(block: Block) -> dict[str, Tensor]:
    """All that learning may have changed, numbered in the order of the block's modules."""
    tensors: list[Tensor] = [*block.module.parameters()]
    for quantizer in block_quantizers(block, "input", "output"):
        tensors += [end for end in (quantizer.lower, quantizer.upper) if end is not None]
    return {str(number): tensor.detach() for number, tensor in enumerate(tensors)}


def _save(block: Block, file: Path) -> None:
    replace_file(file, save({number: tensor.cpu().contiguous() for number, tensor in _learned(block).items()}))


def _load(block: Block, file: Path) -> None:
    saved = load_file(file)
    for number, tensor in _learned(block).items():
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
