"""SmallResNet: its layers, its sizes of images, and its engine."""

from pathlib import Path

import torch

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize


def test_nine_layers_of_david_pages_widths() -> None:
    model = create_model("small-resnet9", 7, in_channels=1, dropout=0.1, bn_momentum=0.2)
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert [tuple(layer.weight.shape[:2]) for layer in layers] == [
        *((32, 1), (64, 32), (64, 64), (64, 64), (128, 64), (256, 128), (256, 256), (256, 256), (7, 256))
    ]
    for size in ((32, 32), (64, 48), (8, 8)):
        assert model.eval()(torch.zeros(2, 1, *size)).shape == (2, 7)


def test_the_engine_computes_what_the_simulation_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    model = calibrate(quantize(create_model("small-resnet9").eval()), [images], method="max")
    export_onnx(model, tmp_path / "small.onnx", 32)
    with torch.no_grad():
        simulated = model(images)
    outputs = torch.from_numpy(load_engine(tmp_path / "small.onnx")(images.numpy()))
    assert ((outputs - simulated).norm() / simulated.norm()).item() < 0.02
    assert (tmp_path / "small.onnx").stat().st_size < 0.3 * 4 * sum(p.numel() for p in model.parameters())
