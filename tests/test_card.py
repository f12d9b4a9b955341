"""ModelCard: what it holds comes back, what no card could hold is refused in one sentence."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effnet_quant import UserError
from effnet_quant.card import InputSpec, ModelCard

CARD = ModelCard(
    arch="efficientnet-b0",
    num_classes=3,
    classes=("a", "b", "c"),
    input=InputSpec(224, 256, "bicubic", (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)),
    activation="hard_swish",
    quant_spec={"weight": {"bits": 8}},
    target="openvino",
    tuned_precision="bf16",
    float_operations=("pool",),
)


def test_a_card_survives_the_way_through_json():
    assert ModelCard.from_text(json.dumps(CARD.to_json())) == CARD
    assert ModelCard.from_json(ModelCard().to_json()) == ModelCard()
    assert CARD.to_json()["version"] == 1


def test_files_from_before_there_were_cards_are_read():
    before = {
        "arch": "efficientnet-b0",
        "num_classes": 3,
        "classes": ["a", "b", "c"],
        "preprocessing": {
            "image_size": 224,
            "resize_size": 256,
            "interpolation": "bicubic",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.1, 0.2, 0.3],
        },
        "hard_swish": True,
        "quant_spec": {"weight": {"bits": 8}},
        "quant_target": "openvino",
        "tuned_precision": "bf16",
        "float_operations": ["pool"],
        "input": {"name": "input", "type": "float32", "layout": "NCHW"},
        "somebody's own": [1, 2],
    }
    assert ModelCard.from_json(before) == CARD


DEEP = json.loads("[" * 900 + "]" * 900)
HOSTILE = [
    [],
    "text",
    7,
    None,
    {"version": 2},
    {"version": True},
    {"version": "1"},
    {"version": 1, "surprise": 1},
    {"version": 1, "classes": "cats"},
    {"version": 1, "classes": [1, 2]},
    {"version": 1, "classes": {"a": 1}},
    {"version": 1, "classes": ["a"], "num_classes": 2},
    {"version": 1, "num_classes": -1},
    {"version": 1, "num_classes": 0},
    {"version": 1, "num_classes": 10**12},
    {"version": 1, "num_classes": 3.0},
    {"version": 1, "num_classes": True},
    {"version": 1, "arch": ["efficientnet-b0"]},
    {"version": 1, "task": 3},
    {"version": 1, "activation": "tanh"},
    {"version": 1, "quant_spec": "w8a8"},
    {"version": 1, "target": {"a": 1}},
    {"version": 1, "input": {"image_size": 3}},
    {"version": 1, "quant_spec": {"overrides": DEEP}},
    {"quant_spec": {"overrides": DEEP}},
    {"classes": 7},
    {"num_classes": "ten"},
    {"preprocessing": 224},
    {"preprocessing": {}},
]
IMAGES = [("image_size", "abc"), ("image_size", float("nan")), ("image_size", 10**9), ("image_size", 0)]
IMAGES += [("resize_size", -1), ("resize_size", None), ("interpolation", "nearest"), ("interpolation", 3)]
IMAGES += [("mean", [0.5]), ("mean", "abc"), ("mean", [float("inf")] * 3), ("std", [0.0, 1.0, 1.0]), ("std", [])]
IMAGES += [("image_size", 4097), ("mean", [10**400] * 3), ("mean", [0.5] * 5000), ("std", [1e-320] * 3)]


@pytest.mark.parametrize("values", HOSTILE, ids=lambda values: repr(values)[:50])
def test_what_no_card_could_hold_is_refused(values):
    with pytest.raises(UserError, match=r"^model\.onnx describes its model in a way that can't be used: .{5,300}\.$"):
        ModelCard.from_json(values, "model.onnx")


@pytest.mark.parametrize(("name", "value"), IMAGES)
def test_images_that_no_network_takes_are_refused(name, value):
    values = CARD.to_json()
    values["preprocessing"][name] = value
    with pytest.raises(UserError, match=name if name != "std" else "std|mean"):
        ModelCard.from_json(values)


@pytest.mark.parametrize("text", ["", "{", "NaN{", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(UserError, match=r"^w\.safetensors describes"):
        ModelCard.from_text(text, "w.safetensors")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
_FIELDS = sorted({*CARD.to_json(), "hard_swish", "quant_target"})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # CI shares its cores
@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON))
def test_any_json_is_a_card_or_a_sentence(values):
    try:
        card = ModelCard.from_json(values)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert ModelCard.from_json(card.to_json()) == card
