"""What specs say, and how they are written down."""

import json

import pytest
import torch
from torch import nn

from effnet_quant import UserError, create_model, quantize
from effnet_quant.models.weights import Weights, load_weights
from effnet_quant.quantization.placement.insertion import output_quantizers, quantizers
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import PRESETS, QuantSpec, TensorSpec, resolve_spec


def network() -> nn.Module:
    blocks = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "layers": blocks, "classifier": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("spec", "bounds"),
    [
        (TensorSpec(), (-128, 127)),
        (TensorSpec(narrow=True), (-127, 127)),
        (TensorSpec(signed=False), (0, 255)),
        (TensorSpec(bits=2), (-2, 1)),
        (TensorSpec(bits=4, narrow=True), (-7, 7)),
        (TensorSpec(bits=16), (-32768, 32767)),
        (TensorSpec(bits=16, signed=False), (0, 65535)),
    ],
)
def test_bounds(spec: TensorSpec, bounds: tuple[int, int]) -> None:
    assert spec.bounds == bounds


def test_the_default_preset_is_nvidias_contract() -> None:
    spec = resolve_spec("w8a8")
    assert spec == QuantSpec()
    assert str(spec.weight) == "int8, per output channel"
    assert str(spec.activation) == "int8, per tensor"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says_and_survives_json(name: str) -> None:
    spec = resolve_spec(name)
    assert f"w{spec.weight.bits}a{spec.activation.bits}" == name.split("-", maxsplit=1)[0]
    assert spec.weight.learned == spec.activation.learned == name.endswith("-lsq")
    assert resolve_spec(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_order_of_overrides_survives_writers_that_sort() -> None:
    pairs = [("stem", "w4a8"), ("stem", "float"), ("layers.*", "w4a8"), ("*.2", "w8a16"), ("stem", "w8a8")]
    spec = resolve_spec("w8a8").with_overrides(pairs)
    read = resolve_spec(json.loads(json.dumps(spec.to_json(), sort_keys=True)))
    assert [(name, read.override(name)) for name, _ in pairs] == [(name, spec.override(name)) for name, _ in pairs]
    assert read == spec
    assert read.override("stem") == resolve_spec("w8a8")


@pytest.mark.parametrize("override", ["float", "w8a16", {"weight": {"bits": 16}}], ids=str)
def test_a_layer_that_is_no_integer_convolution_does_not_round_its_output(override: object) -> None:
    traced = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.SiLU())
    for model, layer in ((traced, "0"), (create_model("efficientnet-b0", 2), "layers.0.block0.depsep")):
        quantize(model, resolve_spec("w8a8").with_overrides({layer: override}))
        outputs = set(output_quantizers(model))
        rounding = [name for name, module in model.named_modules() if module in outputs]
        assert rounding
        assert not any(name.startswith((f"{layer}_", f"{layer}.")) for name in rounding)


@pytest.mark.parametrize(("in_float", "rounded"), [("squeeze", "expand"), ("expand", "squeeze")])
def test_an_output_quantizer_goes_with_its_layer_whatever_is_declared_before_it(in_float: str, rounded: str) -> None:
    model = create_model("efficientnet-b0", 2)
    quantize(model, resolve_spec("w8a8").with_overrides({f"*.se.{in_float}": "float"}))
    points = [model.get_submodule(f"layers.1.block0.se.{name}_output") for name in (in_float, rounded)]
    assert [isinstance(point, nn.Identity) for point in points] == [True, False]


def test_the_rounding_of_an_output_can_be_left_out_by_its_own_name() -> None:
    model = create_model("efficientnet-b0", 2)
    quantize(model, resolve_spec("w8a8").with_overrides({"*.squeeze_output": "float"}))
    outputs = set(output_quantizers(model))
    rounding = [name for name, module in model.named_modules() if module in outputs]
    assert not any(name.endswith("squeeze_output") for name in rounding)
    assert sum(name.endswith("expand_output") for name in rounding) == 16


def test_overrides_go_by_module_and_the_last_one_wins() -> None:
    spec = resolve_spec("w8a8").with_overrides({"layers.*": "w4a8", "layers.2": "w8a16", "classifier": None})
    model = quantize(network(), spec)
    bits = {name: quantizer.spec.bits for name, quantizer in quantizers(model)}
    assert bits == {
        "stem._input_quantizer": 8,
        "stem._weight_quantizer": 8,
        "layers.0._input_quantizer": 8,
        "layers.0._weight_quantizer": 4,
        "layers.2._input_quantizer": 16,
        "layers.2._weight_quantizer": 8,
    }
    assert model.classifier(torch.ones(1, 4)).shape == (1, 2)
    assert resolve_spec(json.loads(json.dumps(spec.to_json()))) == spec


def test_overrides_reach_places_found_on_the_graph_and_single_quantizers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + x

    spec = resolve_spec("w8a8").with_overrides({"*residual*": "w8a8-affine", "*._weight_quantizer": None})
    model = quantize(Residual(), spec)
    kinds = {name: quantizer.spec.symmetric for name, quantizer in quantizers(model)}
    assert kinds == {"conv._input_quantizer": True, "residual_quantizer": False}
    assert model(torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)


def test_a_mapping_changes_a_preset() -> None:
    spec = resolve_spec(
        {
            "preset": "w4a8",
            "weight": {"per_channel": False, "narrow": True},
            "activation": {"symmetric": False, "signed": False},
            "overrides": {"stem": "w8a8", "classifier": None, "layers": {"weight": {"bits": 2}}},
        }
    )
    assert spec.weight == TensorSpec(bits=4, narrow=True)
    assert spec.activation == TensorSpec(symmetric=False, signed=False)
    layers = spec.override("layers.0._input_quantizer")
    assert isinstance(layers, QuantSpec)
    assert layers.weight.bits == 2
    assert spec.override("stem") == QuantSpec()
    assert spec.override("classifier.fc") is None
    assert spec.override("head") == "base"


@pytest.mark.parametrize(("axis", "per_channel"), [(0, True), (None, False)])
def test_axis_of_earlier_versions_is_read_and_per_channel_is_written(axis: int | None, per_channel: bool) -> None:
    fields = {"bits": 4, "symmetric": True, "signed": True, "narrow": False, "learned": False}
    earlier = {"weight": {**fields, "axis": axis}, "activation": {**fields, "axis": None}, "overrides": []}
    spec = resolve_spec(earlier)
    assert (spec.weight.per_channel, spec.activation.per_channel) == (per_channel, False)
    assert spec.weight.amax_shape((6, 3, 5, 5)) == ((6, 1, 1, 1) if per_channel else ())
    written = spec.to_json()
    assert written["weight"] == {**fields, "per_channel": per_channel}
    assert resolve_spec(written) == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("w1a1", r"no quantization preset 'w1a1'.*w8a8"),
        ({"bits": 4}, r"no entry 'bits'.*weight"),
        ({"weight": {"bits": 9}}, "9 bits.*2, 3"),
        ({"weight": {"bits": "4"}}, "'4' is not int"),
        ({"weight": {"symmetric": 0}}, "0 is not bool"),
        ({"weight": 4}, "bits: 4"),
        ({"activation": {"per_channel": True}}, "one range per tensor"),
        ({"activation": {"axis": 0}}, "one range per tensor"),
        ({"weight": {"axis": 1}}, "axis: 1 means nothing; write per_channel: true"),
        ({"weight": {"axis": True}}, "axis: True means nothing"),
        ({"weight": {"axis": 0, "per_channel": True}}, "axis: 0 means nothing"),
        ({"weight": {"signed": False, "narrow": True}}, "must be signed"),
        ({"overrides": ["stem"]}, "overrides map patterns"),
        (4, "not 4"),
    ],
)
def test_mistakes_are_named(spec: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_spec(spec)  # type: ignore[arg-type]


def test_an_override_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(UserError, match="'stems' matches no quantizer"):
        quantize(network(), resolve_spec("w8a8").with_overrides({"stems": "w8a16"}))


def test_affine_quantizers_hold_both_ends() -> None:
    quantizer = TensorQuantizer(TensorSpec(symmetric=False, signed=False))
    assert set(quantizer.state_dict()) == {"_amin", "_amax"}
    assert not quantizer.calibrated
    with pytest.raises(ValueError, match="two ends"):
        quantizer.set_amax(torch.tensor(1.0))
    with pytest.raises(ValueError, match="lower end first"):
        quantizer.set_range(torch.tensor(1.0), torch.tensor(-1.0))
    quantizer.set_range(torch.tensor(-100.0), torch.tensor(155.0))
    assert quantizer.zero_point.item() == 100
    assert quantizer(torch.tensor([-120.0, 1.4, 200.0])).tolist() == [-100, 1, 155]
    assert "uint8, affine" in repr(quantizer)
    assert "amin=-100" in repr(quantizer)


@pytest.mark.parametrize(("made", "loaded"), [("w8a8-affine", "w8a8"), ("w8a8", "w8a8-affine")])
def test_ranges_of_another_symmetry_are_refused_and_a_float_model_drops_them(made: str, loaded: str) -> None:
    source = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), made)
    for _, quantizer in quantizers(source):
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    weights = Weights(source.state_dict())
    assert load_weights(quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), made), weights)
    assert load_weights(nn.Sequential(nn.Conv2d(3, 4, 3)), weights)
    with pytest.raises(UserError, match=r"0\._input_quantizer\._amin"):
        load_weights(quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), loaded), weights)
