"""Calibration in two processes gives the ranges of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from effnet_quant import calibrate, quantize
from effnet_quant.models.layers import OutputPoint
from effnet_quant.quantization.calibration import METHODS
from effnet_quant.quantization.placement.insertion import quantizers


def ranges(images: list[torch.Tensor]) -> dict[str, list[float]]:
    """Of every method, on an affine and a symmetric grid, and what the trackers of outputs hold."""
    found = {}
    for preset in ("w8a8", "w4a4"):
        torch.manual_seed(0)
        model = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), OutputPoint("0"), nn.ReLU(), nn.Conv2d(4, 4, 3)), preset)
        for method in METHODS:
            calibrate(model, images, method)
            for name, quantizer in quantizers(model):
                found[f"{preset} {method} {name}"] = [quantizer.scale.mean().item(), quantizer.zero_point.mean().item()]
        found[f"{preset} output"] = model[1].range
    return found


def calibration_images() -> list[torch.Tensor]:
    """Batches of growing magnitude; one more for the first rank than for the second."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) * 1.7**index for index in range(7)]


def test_two_processes_find_the_ranges_of_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "store")],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    torch.set_num_threads(1)  # the sums of a convolution depend on it
    assert first == second
    assert first == json.loads(json.dumps(ranges(calibration_images())))


def main() -> None:
    """One of the two processes."""
    rank = int(os.environ["RANK"])
    distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    images = calibration_images()
    print(json.dumps(ranges(images[:4] if rank == 0 else images[4:])))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
