"""Model repositories of Triton Inference Server: an engine's file, its configuration and its labels.

The configuration is a ModelConfig message in protobuf's text format (model_config.proto in triton-inference-server/common).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet_quant.card import ModelCard
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.engines.signature import ArrayOutput, Signature
from effnet_quant.engines.tensorrt.plans import find_plan
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file, possible_path, replace_file
from effnet_quant.serving.settings import FILE_NAMES, MAX_BATCH, QUEUE_DELAY_US, Serving

_TYPES = {
    "float64": "TYPE_FP64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}
_LABELS = "labels.txt"


@dataclass(frozen=True)
class _Model:
    """Facts about a file that its configuration needs."""

    signature: Signature
    card: ModelCard


def write_model(
    path: str | Path, repository: str | Path, serving: Serving, *, name: str | None = None, version: int | None = None
) -> Path:
    """Put an engine's file into a model repository. The version's folder appears complete or not at all.

    Args:
        path: an ONNX file, or for TensorRT a plan that ``compile_engine`` wrote.
        repository: the folder that Triton is started with; created if it is missing.
        serving: how Triton serves it.
        name: of the model; None for the file's.
        version: its number; None for the one after the highest that the model has, or 1.

    Returns:
        The version's folder.

    Raises:
        UserError: the file is missing, damaged or not this backend's, the version exists, or a folder can't be written.
    """
    path, repository = possible_path(path), possible_path(repository)
    name = name or path.stem
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"'{name}' can't be the name of a model; choose another with --name.")
    possible_path(repository / name)
    model = _read(path, serving.backend)
    config = model_config(name, model.signature, model.card, serving)
    folder = repository / name
    number = version if version is not None else max([0, *_versions(folder)]) + 1
    if number < 1:
        raise UserError(f"version {number}: Triton counts from 1.")
    if number in _versions(folder):
        raise UserError(f"{folder} has a version {number} already; leave --version out for the next one.")
    texts = {"config.pbtxt": config}
    if labels := model.card.classes:
        texts[_LABELS] = "".join(f"{' '.join(label.split())}\n" for label in labels)
    started = not folder.exists()
    staged: Path | None = None
    try:
        repository.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        # The temporary folder is beside the versions, so the rename stays in one file system. Triton ignores its name.
        staged = Path(tempfile.mkdtemp(dir=folder, prefix=f".{number}."))
        os.chmod(staged, 0o755)
        replace_file(staged / FILE_NAMES[serving.backend], path.read_bytes())
        for file, text in texts.items():
            replace_file(folder / file, text.encode())
        os.rename(staged, folder / str(number))
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}; choose another repository.") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        if started and not _versions(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return folder / str(number)


def model_config(name: str, signature: Signature, card: ModelCard, serving: Serving) -> str:
    """The text of ``config.pbtxt``: a block for each input and each output.

    Raises:
        UserError: the file can't be served as asked.
    """
    smallest, largest = signature.smallest_batch, signature.largest_batch
    if serving.backend == "tensorrt" and smallest > 1 and largest != smallest:
        raise UserError("the plan takes no single images; build it with --min-batch 1 to serve it.")
    # Triton can't batch requests for a file with a fixed batch: the batch is a dimension of its inputs. The same goes for
    # every file for OpenVINO. Otherwise Triton's backend would compile for the largest batch and refuse smaller requests.
    batch = [largest or -1] if serving.backend == "openvino" or largest == smallest else []
    if batch and not (serving.max_batch is None and serving.queue_delay_us is None):
        joins = "OpenVINO in Triton" if serving.backend == "openvino" else "a file with a fixed batch"
        raise UserError(f"{joins} takes each request by itself; leave --max-batch and --queue-delay out.")
    max_batch = min(serving.max_batch or largest or MAX_BATCH, largest or 1 << 30)
    lines = [
        f"name: {_text(name)}",
        f"backend: {_text(serving.backend)}",
        f"default_model_filename: {_text(FILE_NAMES[serving.backend])}",
        f"max_batch_size: {0 if batch else max_batch}",
    ]
    for taken in signature.inputs:
        lines += _block("input", _tensor(taken.name, taken.dtype, [*batch, *_open(taken.shape)]))
    for output in signature.outputs:
        labels = bool(card.classes) and len(signature.outputs) == 1
        lines += _block("output", _tensor(output.name, output.dtype, [*batch, *_dims(output, signature, card)], labels))
    if not batch:
        delay = QUEUE_DELAY_US if serving.queue_delay_us is None else serving.queue_delay_us
        lines += _block("dynamic_batching", [f"max_queue_delay_microseconds: {delay}"])
    kind = "KIND_GPU" if serving.device == "cuda" else "KIND_CPU"
    lines += _block("instance_group", [f"count: {serving.instances}", f"kind: {kind}"])
    if card.input is not None:  # for clients, who read the configuration from the server
        value = json.dumps(card.input.to_json(), sort_keys=True)
        entry = ['key: "preprocessing"', *_block("value", [f"string_value: {_text(value)}"])]
        lines += _block("parameters", entry)
    return "\n".join(lines) + "\n"


def _read(path: Path, backend: str) -> _Model:
    if backend == "tensorrt":
        plan = find_plan(existing_file(path))
        if plan is None:
            raise UserError(
                f"{path} is no plan with its description {path.name}.json beside it; build it with model2trt.py."
            )
        return _Model(plan.signature, plan.card)
    file = read_onnx(path)
    return _Model(file.signature, file.card)


def _versions(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []


def _open(shape: tuple[int | None, ...]) -> list[int]:
    return [-1 if size is None else size for size in shape]


def _dims(output: ArrayOutput, signature: Signature, card: ModelCard) -> list[int]:
    """Sizes of an output without the batch. A single output of unknown size has one entry per class of the card."""
    count = card.num_classes or (len(card.classes) if card.classes else None)
    if len(signature.outputs) == 1 and output.shape in (None, (None,)):
        return _open((count,))
    if output.shape is None:
        raise UserError(f"the file does not say which shape '{output.name}' has; export it again.")
    return _open(output.shape)


def _tensor(name: str, dtype: str, dims: list[int], has_labels: bool = False) -> Iterator[str]:
    if dtype not in _TYPES:
        raise UserError(f"Triton has no type for '{name}', which is {dtype}; export it in another.")
    yield f"name: {_text(name)}"
    yield f"data_type: {_TYPES[dtype]}"
    yield f"dims: {dims}"
    if has_labels:
        yield f"label_filename: {_text(_LABELS)}"


def _block(field: str, lines: Any) -> Iterator[str]:
    yield f"{field} {{"
    yield from (f"  {line}" for line in lines)
    yield "}"


def _text(value: str) -> str:
    """A quoted string in protobuf's text format, which accepts JSON's escapes."""
    return json.dumps(value, ensure_ascii=False)
