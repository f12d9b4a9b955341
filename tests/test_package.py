"""The package as a whole."""

import re
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


def test_the_dockerfile_has_every_script_and_every_requirement(repository) -> None:
    dockerfile = (repository / "Dockerfile").read_text()
    scripts = {path.name for path in repository.glob("*.py")}
    assert scripts <= set(re.search(r"COPY (main.py .*)", dockerfile)[1].split()) | {"setup.py"}
    needed = re.search(r"install_requires=\[(.*?)\n    \]", (repository / "setup.py").read_text(), re.DOTALL)[1]
    needed = {entry.partition(";")[0] for entry in re.findall(r'^        "(.+)"', needed, re.MULTILINE)}
    of_the_image = {"torch>=2.8", "torchvision>=0.23"}
    assert of_the_image < needed
    assert needed - of_the_image <= set(re.findall(r'^    "(.+?)"', dockerfile, re.MULTILINE))
