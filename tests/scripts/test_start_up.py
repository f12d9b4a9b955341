"""The flags of every script are shown without the libraries that its work needs, which take seconds to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from effnet_quant.cli.app import VERBS

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py") if path.name != "setup.py")
# the top-level packages that take a tenth of a second or more
HEAVY = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "PIL", "sklearn", "timm")


def commands():
    rows = [(verb, "effnet_quant/__main__.py", [verb]) for verb in VERBS] + [(name, name, []) for name in SCRIPTS]
    for name, path, words in rows:
        yield pytest.param(path, words, id=name)


def heavy_modules(path, arguments):
    """Runs a script's file in a process of its own: its output, and which of ``HEAVY`` were loaded at its end."""
    code = f"""
import runpy, sys
sys.argv = {[path, *arguments]!r}
try:
    runpy.run_path({str(REPOSITORY / path)!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {HEAVY} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    out, _, loaded = result.stdout.rstrip("\n").rpartition("\n")
    return out, loaded


@pytest.mark.parametrize(("path", "words"), commands())
def test_help_loads_nothing_heavy(path, words):
    out, loaded = heavy_modules(path, [*words, "-h"])
    typed = f"python -m effnet_quant {words[0]}" if words else path
    assert out.startswith(f"usage: {typed} [-h]")
    assert loaded == "[]"


@pytest.mark.parametrize("flag", ["-h", "--version"])
def test_the_list_of_verbs_and_the_version_load_nothing_heavy(flag):
    assert heavy_modules("effnet_quant/__main__.py", [flag])[1] == "[]"
