"""One engine, several callers at once: each gets the answers that it would get alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.models.weights import write_weights

SIZE, CALLERS, CALLS = 16, 8, 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    torch.manual_seed(0)
    model = create_model("cifar-resnet20").eval()
    write_weights(
        folder / "torch.safetensors",
        model.state_dict(),
        ModelCard(arch="cifar-resnet20", input=InputSpec(SIZE, SIZE)),
    )
    small = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()
    calibrate(quantize(small, target="openvino"), [torch.randn(4, 3, SIZE, SIZE)], method="max")
    for target in ("onnxruntime", "openvino"):
        export_onnx(small, folder / f"{target}.onnx", SIZE, target=target)
    return folder


@pytest.mark.parametrize("threads", [None, 1])
@pytest.mark.parametrize("name", ["onnxruntime.onnx", "openvino.onnx", "torch.safetensors"])
def test_callers_in_several_threads_get_the_answers_they_would_get_alone(
    name: str, threads: int | None, folder: Path
) -> None:
    backend = name.split(".", maxsplit=1)[0]
    pytest.importorskip(backend)
    generator = np.random.default_rng(0)
    images = [generator.standard_normal((count, 3, SIZE, SIZE), np.float32) for count in range(1, 8)]
    alone = load_engine(folder / name, backend, threads=threads)
    expected = [alone(batch) for batch in images]
    # a fresh engine: which batch comes first is chance, and must not matter
    shared = load_engine(folder / name, backend, threads=threads)
    order = generator.integers(0, len(images), CALLS).tolist()
    with ThreadPoolExecutor(CALLERS) as callers:
        # what is forgotten meanwhile is compiled again
        answers = list(callers.map(lambda index: shared(images[index]), order[:-100]))
        forgotten = callers.submit(shared.forget_shapes)
        answers += callers.map(lambda index: shared(images[index]), order[-100:])
        forgotten.result()
    wrong = [index for index, answer in zip(order, answers, strict=True) if not np.array_equal(answer, expected[index])]
    assert not wrong, f"{len(wrong)} of {CALLS} calls got other answers than alone"
