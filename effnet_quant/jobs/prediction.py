"""predict: an engine's answers for all images of a folder or of tars, as files of JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_quant.data.decoding import Bytes, DecodeError, EncodedImage
from effnet_quant.data.image_parts import Part, image_parts
from effnet_quant.data.loaders import transformed
from effnet_quant.data.sources import unreadable
from effnet_quant.data.transforms import Transform, evaluation_transform
from effnet_quant.engines.engine import Engine
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, create_folder, existing_file, replace_file
from effnet_quant.jobs.inference import run_engine
from effnet_quant.tasks import get_task
from effnet_quant.training.workspace import LOCK, locked

MANIFEST = "predict.json"
KIND, VERSION = "effnet-quant predictions", 1
BATCH = 32
AHEAD = 4 * BATCH  # images that are read and decoded before the engine needs them


@dataclass(frozen=True)
class Predicted:
    """What ``predict`` did.

    Attributes:
        images: of the whole source.
        before: those whose answers were there already.
        unreadable: those that could not be read, of this run.
        seconds: of this run.
    """

    images: int
    before: int
    unreadable: int
    seconds: float


def predict(
    engine: Engine,
    source: str | Path,
    output: str | Path,
    *,
    topk: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> Predicted:
    """Write an engine's answers for all images of ``source``, one line of JSON each, in files part-00000.jsonl and so on.

    A line has the image's name and the task's answer: {"image": "a/b.jpg", "top": [{"class": …, "probability": …}, …]}. An
    image that can't be read has "error" in the place of the answer. A part's file appears when it is complete. So a run that
    was killed goes on with the first part that is missing, and each image has one line.

    Args:
        engine: takes one image.
        source: a folder of images, with folders in it; a .tar file; or a folder of tars, such as WebDataset's shards.
        output: the folder of the answers; created if it is missing.
        topk: classes in an answer, at most.
        progress: told a title, how many images are done, and how many there are.

    Raises:
        UserError: there are no images, a tar is damaged, the engine takes no single image, or the folder holds answers of
            another engine or for other images.
    """
    if len(engine.inputs) != 1 or not engine.input.is_image:
        raise UserError("predict is for engines that take one image; call this engine with its arrays.")
    if topk < 1:
        raise UserError("--topk must be at least 1.")
    spec = engine.image_spec
    parts = image_parts(source)
    total = sum(len(part.images) for part in parts)
    folder = create_folder(Path(output), "--output")
    check_writable(folder / MANIFEST)
    start = time.monotonic()
    with locked(folder, setting="--output"), ThreadPoolExecutor(_cores()) as pool:
        _check_same(folder, _manifest(engine, source, parts, topk))
        done = before = bad = 0
        for number, part in enumerate(parts):
            path = folder / f"part-{number:05}.jsonl"
            if path.exists():
                before += len(part.images)
                done += len(part.images)
                continue
            lines: list[str] = []
            for batch in _batches(part, evaluation_transform(spec), pool):
                entries = _answers(engine, batch, topk)
                lines += [json.dumps(entry) for entry in entries]
                bad += sum("error" in entry for entry in entries)
                if progress is not None:
                    progress("images", done + len(lines), total)
            if len(lines) != len(part.images):
                raise UserError(f"{source} has changed while it was read; start again with another --output.")
            replace_file(path, "".join(f"{line}\n" for line in lines).encode())
            done += len(lines)
    return Predicted(total, before, bad, time.monotonic() - start)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Read = tuple[str, "Tensor | UserError"]


def _batches(part: Part, transform: Transform, pool: ThreadPoolExecutor) -> Iterator[list[Read]]:
    """The part's images, decoded by the pool while the engine computes."""
    waiting: deque[Future[Read]] = deque()
    batch: list[Read] = []
    reads = part.reads()
    more = True
    while more or waiting:
        while more and len(waiting) < AHEAD:
            entry = next(reads, None)
            if entry is None:
                more = False
            else:
                waiting.append(pool.submit(_prepared, *entry, transform))
        if waiting:
            batch.append(waiting.popleft().result())
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _prepared(name: str, data: Bytes | OSError, transform: Transform) -> Read:
    try:
        if isinstance(data, OSError):
            raise unreadable(name, data)
        try:
            image = EncodedImage(data)
        except (DecodeError, OSError, MemoryError) as error:
            raise unreadable(name, error) from error
        return name, transformed(transform, image, lambda: name)
    except UserError as error:
        return name, error


def _answers(engine: Engine, batch: list[Read], topk: int) -> list[dict[str, Any]]:
    """A line for each image of a batch, in its order."""
    images = [image for _, image in batch if isinstance(image, Tensor)]
    answers: Iterator[dict[str, Any]] = iter(())
    if images:
        outputs = run_engine(engine, torch.stack(images), engine.image_spec)
        answers = iter(get_task(engine.card.task).answers(outputs, engine.classes, topk))
    return [
        {"image": name, **(next(answers) if isinstance(image, Tensor) else {"error": str(image)})}
        for name, image in batch
    ]


def _manifest(engine: Engine, source: str | Path, parts: list[Part], topk: int) -> dict[str, Any]:
    names = hashlib.sha256()
    for part in parts:
        names.update(json.dumps([str(part.tar), part.images]).encode())
    return {
        "kind": KIND,
        "version": VERSION,
        "source": os.path.abspath(source),
        "images": sum(len(part.images) for part in parts),
        "parts": len(parts),
        "names": names.hexdigest(),
        "engine": hashlib.sha256(existing_file(engine.path).read_bytes()).hexdigest(),
        "topk": topk,
    }


def _check_same(folder: Path, wanted: dict[str, Any]) -> None:
    """Note what the folder's answers are of. If it has some already, check that they are of the same.

    Raises:
        UserError: they are not, or the folder holds other files.
    """
    path = folder / MANIFEST
    if not path.exists():
        if others := sorted({entry.name for entry in folder.iterdir()} - {LOCK}):
            raise UserError(f"{folder} holds other files ({others[0]}); choose an empty folder with --output.")
        replace_file(path, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_bytes()[: 2**16])
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path} is not of effnet-quant predict; choose another folder with --output.")
    if different := [name for name, value in wanted.items() if found.get(name) != value]:
        raise UserError(
            f"{folder} holds answers of another run (its {different[0]} differs); choose another folder with --output."
        )
    for left in folder.glob(".part-*"):  # of a run that was killed while it wrote
        left.unlink(missing_ok=True)
