"""The package as a whole."""

import subprocess
import sys

import pytest

import effnet_quant


def test_public_names_resolve_and_are_documented() -> None:
    for name in effnet_quant.__all__:
        value = getattr(effnet_quant, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        effnet_quant.nonsense  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import effnet_quant, sys; print([m for m in ('torch', 'onnx', 'openvino', 'sklearn') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
