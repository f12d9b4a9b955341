"""Packaging of effnet-quant; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "effnet_quant/__init__.py").read_text(encoding="utf-8"))
assert version is not None

openvino = ["openvino>=2025.0"]
executorch = ["executorch>=1.5"]
report = ["matplotlib>=3.8"]
dali = ["nvidia-dali-cuda130>=2.0"]
webdataset = ["webdataset>=1.0", "fsspec>=2024.2"]
tensorboard = ["tensorboard>=2.16"]
timm = ["timm>=1.0.15"]
serve = ["kserve>=0.21"]  # not in dev: 54 packages more; tests/serving/test_serving.py skips
hub = ["huggingface_hub>=0.26"]
completion = ["shtab>=1.7"]

setup(
    name="effnet-quant",
    version=version.group(1),
    description="Train, quantize to 8 bits, export and verify EfficientNet and other image classifiers",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["effnet_quant", "effnet_quant.*"]),
    entry_points={"console_scripts": ["effnet-quant = effnet_quant.cli.app:main"]},
    package_data={"effnet_quant.recipes": ["*.yml"]},
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "numpy>=1.26",
        "onnx>=1.17",
        "onnxruntime>=1.20",
        "pillow>=10",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "scikit-learn>=1.4",
        # where it has wheels; JPEGs are decoded without it too
        "simplejpeg>=1.8; platform_machine in 'x86_64 AMD64 aarch64 arm64'",
        "tqdm>=4.66",
    ],
    extras_require={
        "openvino": openvino,
        "executorch": executorch,
        "report": report,
        "timm": timm,
        "hub": hub,
        "serve": serve,
        "completion": completion,
        "dali": dali,
        "webdataset": webdataset,
        "tensorrt": ["tensorrt>=10.0"],
        "tensorboard": tensorboard,
        "wandb": ["wandb>=0.18"],
        "dev": [
            *openvino,
            *report,
            *dali,
            *webdataset,
            *tensorboard,
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-pyyaml",
            "types-tqdm",
            *timm,
            *hub,
            *completion,
            "tritonclient>=2.50",  # carries the schema of Triton's configurations
        ],
    },
)
