"""launch.py: recipes as command lines."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml

B0 = shlex.split("--model efficientnet-b0 --precision AMP --platform DGXA100")


def test_list_shows_every_model_and_mode(run_script):
    result = run_script("launch.py", "--list")
    assert result.code == 0
    for name in ("efficientnet-b0", "efficientnet-quant-b4", "convergence", "qat", "calibration"):
        assert f"  {name}\n" in result.out
    assert "DGXA100    AMP (256), TF32 (256)" in result.out


def test_dry_run_prints_the_resolved_configuration_and_starts_nothing(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the flags after the recipe's win; NVIDIA's own spelling of a key is a flag too
    result = run_script(
        "launch.py", *B0, "--mode", "convergence", "/data", "--lr", 0.5, "--num_classes", 7, "--dry-run"
    )
    assert result.code == 0, result.err
    values = yaml.safe_load(result.out)
    expected = {
        "amp": True, "static_loss_scale": 128, "workers": 10, "gpu_affinity": "socket_unique_contiguous",
        "optimizer": "rmsprop", "batch_size": 256, "memory_format": "nhwc", "weight_decay": 1e-5, "warmup": 16,
        "augmentation": "autoaugment", "print_freq": 20, "save_checkpoints": True, "lr": 0.5, "num_classes": 7,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert result.out.startswith("# python main.py ")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_quantized_model_is_quant_mains(run_script):
    chosen = shlex.split("--model efficientnet-quant-b0 --precision FP32 --platform DGX1V --mode qat")
    result = run_script("launch.py", *chosen, "/data", "--dry-run")
    assert result.out.startswith("# python quant_main.py ")
    values = yaml.safe_load(result.out)
    assert (values["augmentation"], values["momentum"], values["calibration_method"]) == (None, 0.89, "percentile")


@pytest.mark.parametrize(
    ("mode", "script", "rate"),
    [("convergence", "main", 2.048), ("qat", "quant_main", 0.001), ("calibration", "quant_main", 2.048)],
)
def test_the_mode_says_whether_a_resnet_is_quantized(run_script, mode, script, rate):
    chosen = shlex.split("--model resnet50 --precision TF32 --platform DGXA100 --mode")
    result = run_script("launch.py", *chosen, mode, "/data", "--dry-run")
    assert result.code == 0, result.err
    assert result.out.startswith(f"# python {script}.py ")
    assert yaml.safe_load(result.out)["lr"] == rate


def test_switches_that_are_off_stay_off(run_script):
    result = run_script("launch.py", *B0, "--mode", "benchmark_training", "/data", "--dry-run")
    values = yaml.safe_load(result.out)
    assert (values["training_only"], values["evaluate"], values["save_checkpoints"]) == (True, False, False)
    assert "--no-checkpoints" in result.out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "efficientnet-b0", "/data"], "--mode, --platform, --precision must be given; --list"),
        ([*B0, "--mode", "converge", "/data"], "no mode 'converge' in the recipes; did you mean: convergence"),
        ([*B0, "--mode", "evaluate", "--cfg_file", "gone.yml", "/data"], "no recipe file gone.yml"),
    ],
)
def test_mistakes_are_one_sentence(run_script, arguments, says):
    result = run_script("launch.py", *arguments)
    assert result.code == 2
    assert says in result.error_lines[0]


def test_unknown_key_names_the_nearest_known_one(run_script, tmp_path):
    path = tmp_path / "own.yml"
    path.write_text("mode: {evaluate: {momentun: 0.8}}\n")
    result = run_script("launch.py", *B0, "--mode", "evaluate", "--cfg_file", path, "/data")
    assert result.code == 2
    assert "own.yml has an unknown key 'momentun'; did you mean: momentum" in result.error_lines[0]


def test_benchmark_of_training_writes_speeds_and_the_machine(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = shlex.split("--model efficientnet-b0 --precision TF32 --platform CPU --mode benchmark_training_short")
    small = shlex.split("-b 2 --optimizer-batch-size 2 --image-size 32 --num-classes 10 --epochs 1 --prof 4 -j 0")
    result = run_script("launch.py", *chosen, "digits", "--raport-file", "benchmark.json", *small)
    assert result.code == 0, result.err
    assert "no GPU: TF32 means FP32" in result.out
    (line,) = (json.loads(text) for text in (tmp_path / "benchmark.json").read_text().splitlines())
    data = line["data"]
    # of four batches the first is warm-up
    assert data["train.compute_ips"] == pytest.approx(2 / data["train.compute_time"], rel=1e-6)
    assert data["train.compute_latency"] == data["train.compute_time"]
    quantiles = [data[f"train.compute_latency_at{percent}"] for percent in (50, 95, 99, 100)]
    assert quantiles == sorted(quantiles)
    assert {"device", "processor", "torch", "effnet_quant", "commit", "processes", "threads"} <= set(line["machine"])
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (b"mode: {evaluate: {nesterov: 'false'}}", "nesterov is a switch, true or false, not 'false'"),
        (b"mode: {evaluate: {learning_rate: 0.1}}", "unknown key 'learning_rate'; did you mean: lr"),
        (b"mode: {evaluate: {wd: 0.1}}", "unknown key 'wd'; did you mean: .*weight_decay"),
        (b"mode: {evaluate: {3: x}}", "unknown key '3'"),
        (b"platform: {another: {momentun: 1}}", "unknown key 'momentun'; did you mean: momentum"),
        (b"models: {resnet50: {CPU: {FP32: {momentun: 1}}}}", "unknown key 'momentun'; did you mean: momentum"),
        (b"model_mode: {resnet50: {qat: {momentun: 1}}}", "unknown key 'momentun'; did you mean: momentum"),
        (b"mode: {evaluate: {arch: \xff}}", "can't be read.*UTF-8"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(run_script, tmp_path, recipe, says):
    (tmp_path / "own.yml").write_bytes(recipe)
    result = run_script(
        "launch.py", *B0, "--mode", "evaluate", "/data", "--dry-run", "--cfg_file", tmp_path / "own.yml"
    )
    assert result.code == 2
    assert re.search(says, result.error_lines[0])


def test_a_recipe_of_ones_own_may_name_the_network_and_leave_switches_out(run_script, tmp_path):
    (tmp_path / "own.yml").write_text("mode: {evaluate: {arch: 'timm:resnet18', training_only: null}}")
    result = run_script(
        "launch.py", *B0, "--mode", "evaluate", "/data", "--dry-run", "--cfg_file", tmp_path / "own.yml"
    )
    assert result.code == 0, result.err
    values = yaml.safe_load(result.out)
    assert (values["arch"], values["training_only"]) == ("timm:resnet18", False)
