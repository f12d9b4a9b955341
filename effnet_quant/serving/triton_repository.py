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

from effnet_quant.engines.compiled import ImageInput
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.engines.tensorrt.plans import find_plan
from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.serving.settings import FILE_NAMES, MAX_BATCH, QUEUE_DELAY_US, Serving

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
_LABELS = "labels.txt"


@dataclass(frozen=True)
class _Model:
    """What the server has to know of a file."""

    input: ImageInput
    output: str
    metadata: dict[str, Any]


def write_model(
    path: str | Path, repository: str | Path, serving: Serving, *, name: str | None = None, version: int | None = None
) -> Path:
    """Put an engine's file into a model repository; the folder of its version appears whole or not at all.

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
    path, repository = Path(path), Path(repository)
    name = name or path.stem
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"'{name}' can't be the name of a model; choose another with --name.")
    model = _read(path, serving.backend)
    config = model_config(name, model.input, model.output, model.metadata, serving)
    folder = repository / name
    number = version if version is not None else max([0, *_versions(folder)]) + 1
    if number < 1:
        raise UserError(f"version {number}: Triton counts from 1.")
    if number in _versions(folder):
        raise UserError(f"{folder} has a version {number} already; leave --version out for the next one.")
    texts = {"config.pbtxt": config}
    if labels := model.metadata.get("classes"):
        texts[_LABELS] = "".join(f"{' '.join(str(label).split())}\n" for label in labels)
    started = not folder.exists()
    staged: Path | None = None
    try:
        repository.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        # among the versions, where Triton passes over what is no number: a rename can't leave the file system there
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


def model_config(name: str, image_input: ImageInput, output: str, metadata: dict[str, Any], serving: Serving) -> str:
    """The text of ``config.pbtxt``.

    Raises:
        UserError: the file can't be served as asked.
    """
    smallest, largest = image_input.smallest_batch, image_input.largest_batch
    if serving.backend == "tensorrt" and smallest > 1 and largest != smallest:
        raise UserError("the plan takes no single images; build it with --min-batch 1 to serve it.")
    # a file with a fixed batch is no batching model to Triton: its batch is one more dimension. So it is for OpenVINO
    # always: Triton's backend would compile for the largest batch and refuse every request that does not fill it.
    batch = [largest or -1] if serving.backend == "openvino" or largest == smallest else []
    if batch and not (serving.max_batch is None and serving.queue_delay_us is None):
        joins = "OpenVINO in Triton" if serving.backend == "openvino" else "a file with a fixed batch"
        raise UserError(f"{joins} takes each request by itself; leave --max-batch and --queue-delay out.")
    classes = metadata.get("classes")
    count = metadata.get("num_classes") or (len(classes) if classes else -1)
    image = [-1 if size is None else size for size in image_input.shape]
    max_batch = min(serving.max_batch or largest or MAX_BATCH, largest or 1 << 30)
    lines = [
        f"name: {_text(name)}",
        f"backend: {_text(serving.backend)}",
        f"default_model_filename: {_text(FILE_NAMES[serving.backend])}",
        f"max_batch_size: {0 if batch else max_batch}",
        *_block("input", _tensor(image_input.name, _TYPES[image_input.dtype], [*batch, *image])),
        *_block("output", _tensor(output, "TYPE_FP32", [*batch, count], has_labels=bool(classes))),
    ]
    if not batch:
        delay = QUEUE_DELAY_US if serving.queue_delay_us is None else serving.queue_delay_us
        lines += _block("dynamic_batching", [f"max_queue_delay_microseconds: {delay}"])
    kind = "KIND_GPU" if serving.device == "cuda" else "KIND_CPU"
    lines += _block("instance_group", [f"count: {serving.instances}", f"kind: {kind}"])
    if "preprocessing" in metadata:  # for clients, who read the configuration from the server
        value = json.dumps(metadata["preprocessing"], sort_keys=True)
        entry = ['key: "preprocessing"', *_block("value", [f"string_value: {_text(value)}"])]
        lines += _block("parameters", entry)
    return "\n".join(lines) + "\n"


def _read(path: Path, backend: str) -> _Model:
    if backend == "tensorrt":
        if not path.is_file():
            raise UserError(f"there is no file {path}; check the path.")
        plan = find_plan(path)
        if plan is None:
            raise UserError(
                f"{path} is no plan with its description {path.name}.json beside it; build it with model2trt.py."
            )
        return _Model(plan.input, plan.output, plan.metadata)
    file = read_onnx(path)
    return _Model(file.input, file.output, file.metadata)


def _versions(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []


def _tensor(name: str, data_type: str, dims: list[int], *, has_labels: bool = False) -> Iterator[str]:
    yield f"name: {_text(name)}"
    yield f"data_type: {data_type}"
    yield f"dims: {dims}"
    if has_labels:
        yield f"label_filename: {_text(_LABELS)}"


def _block(field: str, lines: Any) -> Iterator[str]:
    yield f"{field} {{"
    yield from (f"  {line}" for line in lines)
    yield "}"


def _text(value: str) -> str:
    """A string of protobuf's text format; JSON's escapes are among its own."""
    return json.dumps(value, ensure_ascii=False)
