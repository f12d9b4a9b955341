"""effnet-quant data: inspect a data set, check its images, and pack them into shards."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable

if TYPE_CHECKING:
    from effnet_quant.data.sources import ImageSource

_SAMPLE = 1000  # images whose size is read without --check
_SHOWN = 20  # classes or broken files that are listed


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Show what is in a data set, check its images and pack them into shards.")
    parser.add_argument("data", metavar="DATA", help="a data set as for main.py; see docs/data.md")
    parser.add_argument("--check", action="store_true", help="decode every image and name the broken ones")
    parser.add_argument("--pack", metavar="FOLDER", type=Path, help="write the images as WebDataset shards into FOLDER")
    parser.add_argument("--images-per-shard", type=int, default=1000, help="images per shard (default: 1000)")
    parser.add_argument("--index", action="store_true", help="write an index of existing shards")
    parser.add_argument(
        "-j", "--workers", type=int, default=os.cpu_count(), help="reading processes (default: all cores)"
    )
    return parser


def job(arguments: Sequence[str]) -> int:
    """Inspect a data set as the command line says; returns the exit status, 1 if there are broken images."""
    return _run(build_parser().parse(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from effnet_quant.data.shards import write_index
    from effnet_quant.data.sources import EncodedSource

    if arguments.images_per_shard < 1 or arguments.workers < 0:
        raise UserError("--images-per-shard must be at least 1 and --workers at least 0.")
    if arguments.index:
        index = write_index(arguments.data)
        print(f"{sum(index.images.values())} images in {len(index.images)} shards")
        return 0
    broken = 0
    splits = _splits(arguments.data)
    if arguments.pack is not None and not all(isinstance(source, EncodedSource) for source in splits.values()):
        raise UserError("--pack takes image files: a folder, or ImageNet's tar files.")
    for split, source in splits.items():
        broken += _describe(split, source, arguments)
        if arguments.pack is not None:
            _pack(split, source, arguments.pack, arguments.images_per_shard)
    return 1 if broken else 0


def _splits(data: str) -> dict[str, ImageSource]:
    from effnet_quant.data.data_argument import is_split, open_sources, open_training, open_validation
    from effnet_quant.data.shards import is_one_set

    if is_one_set(data):
        return {"shards": open_validation(data)}
    if is_split(data, "train") and not is_split(data, "val"):
        return {"train": open_training(data)}
    if is_split(data, "val") and not is_split(data, "train"):
        return {"val": open_validation(data)}
    train, val = open_sources(data)
    return {"train": train, "val": val}


def _describe(split: str, source: ImageSource, arguments: argparse.Namespace) -> int:
    """Print what a split holds; returns the number of broken images."""
    from effnet_quant.data.inspection import Findings, counts, is_random_access, look

    print(f"{split}: {len(source)} images, {len(source.classes)} classes", flush=True)
    if is_random_access(source):
        _print_counts(source.classes, counts(source).tolist())
    elif not arguments.check:
        return 0
    limit = None if arguments.check else _SAMPLE
    findings = Findings()
    for findings in look(source, decode=arguments.check, workers=arguments.workers, limit=limit):
        if findings.looked_at % 1000 == 0:
            print(f"  {findings.looked_at} images looked at", file=sys.stderr, flush=True)
    if findings.by_class:
        _print_counts(source.classes, [findings.by_class[label] for label in range(len(source.classes))])
    if findings.sizes:
        heights, widths = zip(*findings.sizes, strict=True)
        print(
            f"  size of {findings.looked_at} of them: {min(widths)} to {max(widths)} x {min(heights)} to {max(heights)}, "
            f"median {statistics.median(widths):g} x {statistics.median(heights):g} pixels"
        )
    for sentence in findings.broken[:_SHOWN]:
        print(f"  {printable(sentence)}")
    if len(findings.broken) > _SHOWN:
        print(f"  and {len(findings.broken) - _SHOWN} more")
    if arguments.check:
        print(f"  broken: {len(findings.broken)} of {findings.looked_at}")
    return len(findings.broken)


def _print_counts(classes: list[str], by_class: list[int]) -> None:
    print(f"  images a class: {min(by_class)} to {max(by_class)}, median {statistics.median(by_class):g}")
    if len(by_class) <= _SHOWN:
        print("  " + ", ".join(f"{printable(name)} {count}" for name, count in zip(classes, by_class, strict=True)))


def _pack(split: str, source: ImageSource, folder: Path, images_per_shard: int) -> None:
    from effnet_quant.data.shards import pack
    from effnet_quant.data.sources import EncodedSource

    assert isinstance(source, EncodedSource)
    for written in pack(source, folder / split, images_per_shard):
        if written % 1000 == 0:
            print(f"  {written} images written", file=sys.stderr, flush=True)
    print(f"  packed into {printable(str(folder / split))}")


def main() -> None:
    """Entry point of ``effnet-quant data``."""
    run(job)
