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
held = [torch.ones(16 * 2**20) for _ in range(40)]  # 64 MiB each, together more than 2 GiB
del held
for _ in range(10):
    held = [torch.ones(16 * 2**20) for _ in range(40)]
    del held
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = [torch.ones(16 * 2**20) for _ in range(40)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, keep, **environment):
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return int(subprocess.run(program, env=inherited | environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_tensors_reuse_the_memory_of_freed_ones():
    assert page_faults(keep=True) < page_faults(keep=False) / 2


def test_the_users_own_settings_of_malloc_stay():
    own = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    assert page_faults(keep=True, **own) == pytest.approx(page_faults(keep=False, **own), rel=0.05)
