"""Networks of timm and torchvision under our names."""

import dataclasses
import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torchvision.transforms import v2

from effnet_quant import create_model, list_models
from effnet_quant.models.entry import InputSpec, ModelEntry
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, load_weights


@pytest.mark.parametrize(
    "name", ["timm:resnet18", "timm:mobilenetv3_small_050", "torchvision:squeezenet1_1", "torchvision:mnasnet0_5"]
)
@torch.no_grad()
def test_a_network_is_the_librarys_own(name: str) -> None:
    library, _, model = name.partition(":")
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    theirs = build(model, num_classes=7).eval()
    ours = create_model(name, weights=Weights(theirs.state_dict())).eval()  # the class count is the weights'
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)
    assert ours(images).shape == (2, 7)


def test_options_reach_the_librarys_network() -> None:
    model = create_model(
        "timm:efficientnet_lite0", 5, dropout=0.4, survival_prob=0.9, in_channels=1, bn_momentum=0.3, bn_epsilon=0.01
    )
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    assert model.drop_rate == 0.4
    assert max(getattr(module, "drop_prob", 0) for module in model.modules()) == pytest.approx(0.1, abs=0.01)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.3, 0.01)}


def test_images_are_prepared_as_the_library_says() -> None:
    # timm: pretrained_cfg; 224 / 0.95 = 235.8
    assert get_entry("timm:resnet50").input == InputSpec(224, 235, "bicubic")
    assert get_entry("timm:resnet50.tv_in1k").input == InputSpec(224, 256, "bilinear")
    half = (0.5, 0.5, 0.5)
    assert get_entry("timm:tf_efficientnetv2_s").input == InputSpec(300, 300, "bicubic", half, half)
    # torchvision: the transforms of the weights
    assert get_entry("torchvision:resnet50").input == InputSpec(224, 232, "bilinear")
    assert get_entry("torchvision:efficientnet_b3").input == InputSpec(300, 320, "bicubic")


@pytest.mark.parametrize("model", ["inception_v3", "googlenet"])
@torch.no_grad()
def test_torchvisions_own_normalisation_of_the_input_is_in_the_preprocessing_instead(model: str) -> None:
    theirs = torchvision.models.get_model(model, aux_logits=False, transform_input=True, init_weights=False).eval()
    entry = get_entry(f"torchvision:{model}")
    ours = entry.create(1000).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.rand(2, 3, 80, 80)
    imagenet = v2.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    own = v2.functional.normalize(pixels, list(entry.input.mean), list(entry.input.std))
    torch.testing.assert_close(ours(own), theirs(imagenet), rtol=1e-4, atol=1e-5)
    assert isinstance(ours.train()(own), torch.Tensor)  # no auxiliary logits


@pytest.mark.parametrize("model", ["googlenet", "mnasnet0_5", "densenet121"])
@torch.no_grad()
def test_torchvisions_published_weights_load(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as torchvision publishes them, from its cache: auxiliary classifiers, versions, names of old layers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights(model).DEFAULT
    state = torchvision.models.get_model(model, weights=None).state_dict()
    if model == "densenet121":  # of 2017
        names = [name for name in state if not name.endswith("num_batches_tracked")]
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): state[name] for name in names}
    content = io.BytesIO()
    torch.save(state, content)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    path = tmp_path / "hub/checkpoints" / weights.url.rpartition("/")[2]
    path.write_bytes(content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(digest)
    ours = create_model(f"torchvision:{model}", pretrained=True)
    theirs = torchvision.models.get_model(model, weights=weights)
    images = torch.randn(2, 3, 64, 64)
    if model == "googlenet":
        theirs.transform_input = False
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=0)
    published = get_entry(f"torchvision:{model}").pretrained()
    assert published.card.classes[:2] == ("tench", "goldfish")


def test_own_names_starting_with_layer1_stay_as_they_are() -> None:
    model = create_model("timm:resnet18", 3)
    state = {f"module.{name}": tensor for name, tensor in create_model("timm:resnet18", 3).state_dict().items()}
    assert load_weights(model, Weights(state)) is True
    assert torch.equal(model.layer1[0].conv1.weight, state["module.layer1.0.conv1.weight"])


def test_timm_is_only_needed_for_its_networks_and_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from effnet_quant import create_model, list_models, UserError\n"
        "create_model('cifar-resnet20'), list_models('torchvision:*')\n"
        "try: create_model('timm:resnet18')\n"
        "except UserError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "timm is not installed; install it with: pip install 'effnet-quant[timm]'."


def _sample() -> list[str]:
    """All networks of torchvision and the first of every file of timm."""
    firsts = {
        timm.list_models(module=module)[0]: None for module in timm.list_modules() if timm.list_models(module=module)
    }
    return [*list_models("torchvision:*"), *(f"timm:{name}" for name in firsts)]


def _shapes(entry: ModelEntry, num_classes: int) -> dict[str, torch.Tensor]:
    return dataclasses.replace(entry, num_classes=num_classes).shapes().state_dict()


@pytest.mark.slow
def test_networks_build_and_their_class_count_is_found() -> None:
    failures = {}
    for name in _sample():
        entry = get_entry(name)
        count = entry.class_count(Weights(_shapes(entry, 7)))
        if count != 7:
            failures[name] = count
    assert not failures
