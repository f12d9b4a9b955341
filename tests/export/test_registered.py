"""Every registered network through export, lint and both runtimes (benchmarks/registry_sweep.py); B7 at its own size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from registry_sweep import default_size, examine

from effnet_quant import list_models


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_registered_network(name: str) -> None:
    row = examine(name, default_size(name))
    assert max(row.errors.values()) < 1e-5
    quantized = row.quantized
    assert (quantized is None) == (name.startswith("efficientnet") and "quant" not in name)
    if quantized is None:
        return
    assert quantized.findings == []
    assert quantized.layer_error < 1e-2
    # half an integer on every bias moves the simulation as much
    assert max(quantized.errors.values()) < max(2e-2, 2 * quantized.rounding_error)
    assert quantized.size < 0.32 * row.size


EXPORT = """
import resource, sys, time, torch
from random_weights import with_statistics
from registry_sweep import relative_error
from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize
torch.manual_seed(0)
path, target = sys.argv[1:]
model = with_statistics(create_model("efficientnet-quant-b7", quantized=False)).eval()
calibrate(quantize(model, target=target), [torch.randn(4, 3, 128, 128)], method="max")
start = time.process_time()
export_onnx(model, path, 600, target=target)
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
with torch.inference_mode():
    image = torch.randn(1, 3, 600, 600)
    got = torch.from_numpy(load_engine(path, target, threads=1)(image.numpy()))
    print(relative_error(got, model(image)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_b7_at_600_px_is_written_within_three_minutes_and_4_gib(target: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}"}
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "b7.onnx"), target]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, env=environment).stdout
    print(out)
    seconds, gib, error = map(float, out.split())
    assert seconds < 180
    assert gib < 4
    assert error < 5e-2
