"""classify.py: what is in this image?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.inference import load_model
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import add_spec_arguments
from effnet_quant.data.sources import read_image
from effnet_quant.data.transforms import CROP_MARGIN, Preprocessing, evaluation_transform, normalize
from effnet_quant.deploy.engine import BACKENDS, load_engine
from effnet_quant.errors import UserError

TOP = 5


def job(arguments: Sequence[str]) -> int:
    """Classify as the command line says; returns the exit status."""
    parser = Parser("Classify one image with PyTorch weights or an ONNX file.")
    add_model_arguments(parser, None)
    add_spec_arguments(parser)
    parser.add_argument("--image", required=True, metavar="FILE", help="the image")
    parser.add_argument("--image-size", type=int, help="image size in pixels (default: the weights', else the model's)")
    parser.add_argument("--precision", choices=("AMP", "FP32"), default="FP32", help="arithmetic of PyTorch weights")
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="runtime of an ONNX file")
    parsed = parser.parse(arguments)
    if not parsed.pretrained_from_file and not parsed.pretrained:
        raise UserError(
            "there are no weights; give a weights or .onnx file with --pretrained-from-file, or --pretrained."
        )
    image = read_image(parsed.image)
    if (parsed.pretrained_from_file or "").endswith(".onnx"):
        engine = load_engine(parsed.pretrained_from_file, parsed.backend)
        metadata = engine.metadata
        predict: Callable[[Tensor], Tensor] = lambda images: torch.from_numpy(engine(images.numpy()))  # noqa: E731
    else:
        model, metadata = load_model(parsed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

        def predict(images: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=parsed.precision == "AMP"):
                return model(images.to(device)).float().cpu()

    preprocessing = _preprocessing(metadata)
    images = normalize(evaluation_transform(preprocessing)(image)[None], preprocessing)
    with torch.no_grad():
        probabilities = predict(images)[0].softmax(0)
    _print_top(parsed.image, probabilities, metadata.get("classes"))
    return 0


def _preprocessing(metadata: dict[str, Any]) -> Preprocessing:
    if "preprocessing" in metadata:
        return Preprocessing.from_json(metadata["preprocessing"])
    if "image_size" not in metadata:
        raise UserError("the ONNX file does not say how its images are prepared; export it with model2onnx.py.")
    return Preprocessing(metadata["image_size"], metadata["image_size"] + CROP_MARGIN)


def _print_top(image: str, probabilities: Tensor, classes: list[str] | None) -> None:
    print(image)
    values, indices = probabilities.topk(min(TOP, len(probabilities)))
    for value, index in zip(values.tolist(), indices.tolist(), strict=True):
        print(f"  {100 * value:6.2f} %  {classes[index] if classes else f'class {index}'}")


def main() -> None:
    """Entry point of the script."""
    run(job)
