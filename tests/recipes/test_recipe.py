"""Recipes: NVIDIA's values, as tests/reference/recipes.json holds them, and the seed's for QAT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effnet_quant.errors import UserError
from effnet_quant.recipes.recipe import load_recipes, resolve

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "recipes.json").read_text())
COMBINATIONS = [
    (model, mode, platform, precision)
    for model, platforms in REFERENCE["models"].items()
    for platform, precisions in platforms.items()
    for precision in precisions
    for mode in REFERENCE["mode"]
]


@pytest.fixture(scope="module")
def recipes():
    return load_recipes()


def numbers(values):
    """The reference has some numbers as text."""
    return {name: float(value) if name == "weight_decay" else value for name, value in values.items()}


def test_every_recipe_of_nvidia_has_its_values(recipes):
    assert len(COMBINATIONS) == (6 * 8 + 2 * (6 + 5 + 5)) * 5
    for model, mode, platform, precision in COMBINATIONS:
        expected = {
            **REFERENCE["precision"][precision],
            **REFERENCE["platform"][platform],
            **REFERENCE["models"][model][platform][precision],
            **REFERENCE["mode"][mode],
            "arch": model,  # which a few of the reference's leave out
        }
        ours = resolve(recipes, model=model, mode=mode, platform=platform, precision=precision)
        ours.pop("tf32", None)  # a flag of ours: NVIDIA's containers switch it in the environment
        assert numbers(ours) == numbers(expected), (model, mode, platform, precision)


@pytest.mark.parametrize(
    "model", ["efficientnet-b0", "efficientnet-quant-b0", "efficientnet-widese-b4", "resnet50", "se-resnext101-32x4d"]
)
@pytest.mark.parametrize("platform", ["H100", "A100", "L4", "CPU"])
@pytest.mark.parametrize("precision", ["AMP", "TF32", "FP32"])
def test_todays_platforms_have_recipes(recipes, model, platform, precision):
    values = resolve(recipes, model=model, mode="convergence", platform=platform, precision=precision)
    assert values["optimizer_batch_size"] % values["batch_size"] == 0
    assert values["amp"] == (precision == "AMP")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "efficientnet-quant-b0",
            {"optimizer": "sgd", "momentum": 0.89, "lr": 0.0125, "batch_size": 128, "lr_schedule": "cosine",
             "weight_decay": 4.5e-5, "epochs": 10},
        ),
        (
            "efficientnet-quant-b4",
            {"optimizer": "rmsprop", "rmsprop_alpha": 0.853, "rmsprop_eps": 0.00422, "momentum": 0.9, "lr": 4.09e-6,
             "batch_size": 32, "lr_schedule": "linear", "weight_decay": 9.714e-4, "epochs": 2},
        ),
    ],
)  # fmt: skip
def test_qat_has_the_values_of_the_seeds_table(recipes, model, expected):
    values = resolve(recipes, model=model, mode="qat", platform="DGX1V-32G", precision="FP32")
    assert {name: values[name] for name in expected} == expected
    assert values["optimizer_batch_size"] == -1
    assert not any(values[name] for name in ("warmup", "mixup", "label_smoothing", "augmentation"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "efficientnet-b00"}, "no model 'efficientnet-b00'.*efficientnet-b0"),
        ({"platform": "DGXA10"}, "no platform for efficientnet-b0 'DGXA10'.*DGXA100"),
        ({"precision": "FP16"}, "no precision 'FP16'.*TF32|FP32"),
        ({"mode": "benchmark_trainin"}, "no mode 'benchmark_trainin'.*benchmark_training"),
        ({"platform": "DGXA100", "precision": "FP32"}, "no precision for efficientnet-b0 on DGXA100 'FP32'.*TF32"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(recipes, change, says):
    chosen = {"model": "efficientnet-b0", "mode": "evaluate", "platform": "T4", "precision": "AMP", **change}
    with pytest.raises(UserError, match=says):
        resolve(recipes, **chosen)


def test_recipes_of_ones_own_go_over_the_built_in_ones(tmp_path, recipes):
    path = tmp_path / "own.yml"
    path.write_text("models: {efficientnet-b0: {CPU: {FP32: {lr: 0.5}}}}\nplatform: {CPU: {workers: 7}}\n")
    own = load_recipes(path)
    chosen = {"mode": "convergence", "platform": "CPU", "precision": "FP32"}
    values = resolve(own, model="efficientnet-b0", **chosen)
    before = resolve(recipes, model="efficientnet-b0", **chosen)
    assert values == {**before, "lr": 0.5, "workers": 7}
    # in the file, another model's recipe is the same YAML object
    assert resolve(own, model="efficientnet-widese-b0", **chosen)["lr"] == 0.08


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "is no YAML"),
        ("- 1", "holds no recipes"),
        ("anchors: {}", "holds no recipes"),
        ("model: {}", "unknown section 'model'; did you mean: models"),
        ("mode: {}\nplatforms: {}", "unknown section 'platforms'; did you mean: platform"),
        ("mode: 3", "is a mapping"),
    ],
)
def test_files_that_hold_no_recipes_are_refused(tmp_path, text, says):
    path = tmp_path / "own.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_recipes(path)


@pytest.mark.parametrize(
    "text",
    [
        "precision: {FP32: 3}",
        "platform: {T4: 3}",
        "models: {efficientnet-b0: {T4: {FP32: 3}}}",
        "models: {efficientnet-b0: {T4: 3}}",
        "model_mode: {efficientnet-b0: 3}",
        "model_mode: {efficientnet-b0: {evaluate: 3}}",
        "mode: {evaluate: 3}",
    ],
)
def test_a_recipe_that_is_no_mapping_is_named(tmp_path, text):
    path = tmp_path / "own.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"'(FP32|T4|efficientnet-b0|evaluate)' is 3, not a mapping"):
        resolve(load_recipes(path), model="efficientnet-b0", mode="evaluate", platform="T4", precision="FP32")


ALIASES = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))
MERGES = "".join(
    f"k{n}: &k{n} {{{', '.join(f'x{m}: *k{n - 1}' if n else f'x{m}: 1' for m in range(9))}}}\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ALIASES, "more than 65,536 values with its aliases written out"),
        (MERGES + "mode: {evaluate: *k11}", "more than 65,536 values"),
        ("mode: &m {evaluate: *m}", "more than 65,536 values"),
        ("mode: {evaluate: {lr: &x [*x]}}", "more than 65,536 values"),
        ("[" * 50_000, "nested more than 16 deep"),
        ("{a: " * 50_000, "nested more than 16 deep"),
        ("".join(" " * n + "a:\n" for n in range(3000)), "nested more than 16 deep|longer than"),
        ("a: " + "x" * 2**21, "longer than 1,048,576 characters"),
        ("mode: {evaluate: {lr: 2001-99-99}}", "is no YAML"),
        ("mode: {evaluate: {lr: " + "9" * 5000 + "}}", "is no YAML"),
        ("mode: {evaluate: {lr: !!int x}}", "is no YAML"),
        ("mode: {evaluate: {lr: !!bool x}}", "is no YAML"),
        ("mode: {evaluate: !!python/object/apply:os.system [true]}", "is no YAML"),
        ("? {a: b}\n: c", "is no YAML"),
        ("mode: {evaluate: {lr: [1, 2]}}", r"mode: evaluate: lr is \[1, 2\], not a single value"),
        ("mode: {evaluate: {lr: {a: 1}}}", "not a single value"),
        ("models: {3: {CPU: {FP32: {lr: 1}}}}", "3 is no name; put it in quotes"),
        ("models: {x: {CPU: [1]}}", r"models: x: 'CPU' is \[1\], not a mapping"),
        ('"mode\\e[2J": 3', r"unknown section 'mode\\x1b\[2J'"),
    ],
)
def test_bombs_and_values_of_no_recipe_are_refused_at_once(tmp_path, text, says):
    path = tmp_path / "own.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_recipes(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe file .*gone\.yml"):
        load_recipes(tmp_path / "gone.yml")
