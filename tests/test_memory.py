import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from effnet_quant.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def step():
    held = [torch.ones(16 * 2**20) for _ in range({tensors})]  # 64 MiB each
for _ in range(2 + 16 // {tensors}):  # until the heap has its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / {tensors})
"""


def page_faults(*, keep, tensors, **environment):
    """Of a step that allocates and frees so many tensors, for each of them."""
    program = [sys.executable, "-c", PROGRAM.format(keep=keep, tensors=tensors)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return float(subprocess.run(program, env=inherited | environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("tensors", [2, pytest.param(36, marks=pytest.mark.slow)])  # 36 are more than 2 GiB
def test_tensors_reuse_the_memory_of_freed_ones(tensors):
    assert page_faults(keep=True, tensors=tensors) < page_faults(keep=False, tensors=2) / 10


@pytest.mark.slow
def test_the_users_own_settings_of_malloc_stay():
    own = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    assert page_faults(keep=True, tensors=2, **own) == pytest.approx(
        page_faults(keep=False, tensors=2, **own), rel=0.05
    )
