"""Calibration against numpy on all values at once."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.quantization.calibration import METHODS, collect, report_ranges, set_ranges, track_outputs
from effnet_quant.quantization.calibration.calibrator import Calibrator, HistogramCalibrator
from effnet_quant.quantization.calibration.histogram import BINS, SeenTensors
from effnet_quant.quantization.calibration.maximum import MaxCalibrator
from effnet_quant.quantization.calibration.methods import calibrator_factory
from effnet_quant.quantization.calibration.moving_average import MovingAverageCalibrator
from effnet_quant.quantization.calibration.mse import MseCalibrator
from effnet_quant.quantization.calibration.percentile import PercentileCalibrator
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.qat import reestimate_batch_norm
from effnet_quant.quantization.spec import PRESETS, TensorSpec


def tiny(preset: str = "w8a8") -> nn.Module:
    torch.manual_seed(0)
    return quantize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), preset
    )


def heavy_tailed(count: int = 200_000, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, count).astype(np.float32))


VALUES = {
    "heavy tails": heavy_tailed(),
    "behind a ReLU": heavy_tailed(seed=2).relu(),
    "behind a SiLU": nn.functional.silu(heavy_tailed(seed=3) * 2),
    "far from zero": heavy_tailed(seed=4).abs() * 0.01 - 5,
}
INT8, UINT8, INT4 = TensorSpec(), TensorSpec(signed=False), TensorSpec(bits=4)
AFFINE8, AFFINE4 = (TensorSpec(bits=bits, symmetric=False, signed=False) for bits in (8, 4))


def counted(values: torch.Tensor, batches: int = 7) -> HistogramCalibrator:
    calibrator = MseCalibrator()
    for batch in values.chunk(batches):
        calibrator.observe(batch)
    return calibrator


def choose_range(
    collected: Calibrator, spec: TensorSpec, method: str, percentile: float | None = None
) -> tuple[float, float]:
    calibrator = calibrator_factory(method, percentile)()
    calibrator.adopt(collected)
    return calibrator.range(spec)


def width(values: torch.Tensor) -> float:
    """Of a bin: 4096 to the power of two above the largest magnitude."""
    return 2.0 ** (np.floor(np.log2(values.abs().max().item())) + 1) / 4096


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_numpys_within_a_bin(percentile: float, values: torch.Tensor) -> None:
    calibrator, exact = counted(values), values.double().numpy()
    low, high = choose_range(calibrator, INT8, "percentile", percentile)
    expected = np.percentile(np.abs(exact), percentile, method="inverted_cdf")
    assert high == -low == pytest.approx(expected, abs=1.01 * width(values))
    assert high <= np.abs(exact).max()
    _, high = choose_range(calibrator, UINT8, "percentile", percentile)
    expected = np.percentile(np.maximum(exact, 0), percentile, method="inverted_cdf")
    assert high == pytest.approx(expected, abs=1.01 * width(values))
    low, high = choose_range(calibrator, AFFINE8, "percentile", percentile)
    tail = (100 - percentile) / 2
    assert high == pytest.approx(np.percentile(exact, 100 - tail, method="inverted_cdf"), abs=1.01 * width(values))
    assert low == pytest.approx(-np.percentile(-exact, 100 - tail, method="inverted_cdf"), abs=1.01 * width(values))
    assert exact.min() <= low <= high <= exact.max()


def kl_by_the_slides(counts: np.ndarray, levels: int) -> int:
    """TensorRT's search as its slides write it, a threshold at a time."""
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    best, chosen = np.inf, len(counts)
    for size in range(levels, len(counts) + 1):
        inside = counts[:size]
        reference = inside.copy()
        reference[-1] += counts[size:].sum()
        groups = np.arange(size) * levels // size
        occupied = np.bincount(groups, inside > 0, levels)
        mean = np.bincount(groups, inside, levels) / np.maximum(occupied, 1)
        candidate = np.where(inside > 0, mean[groups], 0)
        p, q = reference / reference.sum(), candidate / candidate.sum()
        where = p > 0
        with np.errstate(divide="ignore"):
            divergence = (p[where] * np.log(p[where] / q[where])).sum()
        if divergence <= best:
            best, chosen = divergence, size
    return chosen


@pytest.mark.parametrize("values", [VALUES["heavy tails"], VALUES["behind a ReLU"]], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize(("spec", "levels"), [(INT8, 128), (UINT8, 256), (INT4, 8)], ids=str)
def test_entropy_is_tensorrts_search_within_a_bin(spec: TensorSpec, levels: int, values: torch.Tensor) -> None:
    exact = values.double().numpy()
    exact = np.maximum(exact, 0) if not spec.signed else np.abs(exact)
    bins = int(np.ceil(exact.max() / width(values)))
    counts = np.histogram(exact, bins, (0, bins * width(values)))[0]
    expected = min(kl_by_the_slides(counts, levels) * width(values), exact.max())
    _, high = choose_range(counted(values), spec, "entropy")
    assert high == pytest.approx(expected, abs=1.01 * width(values))


def test_entropy_on_an_affine_grid_keeps_the_side_that_is_there() -> None:
    low, high = choose_range(counted(VALUES["behind a ReLU"]), AFFINE8, "entropy")
    assert low == 0
    assert 0 < high <= VALUES["behind a ReLU"].max()
    low, high = choose_range(counted(VALUES["behind a SiLU"]), AFFINE8, "entropy")
    assert low == pytest.approx(VALUES["behind a SiLU"].min().item())


def squared_error(values: np.ndarray, spec: TensorSpec, low: float, high: float) -> float:
    """By the textbook, in float64."""
    first, last = spec.bounds
    scale, zero = high / last, 0.0
    if not spec.symmetric:
        scale = (high - low) / (last - first)
        zero = first - np.rint(low / scale)
    quantized = (np.clip(np.rint(values / scale) + zero, first, last) - zero) * scale
    return float(((quantized - values) ** 2).sum())


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("spec", [INT8, INT4, TensorSpec(bits=3, narrow=True), UINT8], ids=str)
def test_mse_is_the_best_of_all_thresholds(spec: TensorSpec, values: torch.Tensor) -> None:
    exact = values[:20_000].double().numpy()
    largest = np.abs(exact).max() if spec.signed else exact.max()
    _, high = choose_range(counted(values[:20_000]), spec, "mse")
    if largest <= 0:
        assert high == 0
        return
    step = width(values[:20_000])
    errors = {edge: squared_error(exact, spec, -edge, edge) for edge in np.arange(step, largest, 3 * step)}
    best = min(errors, key=errors.__getitem__)
    # a flat or jagged minimum has many arguments: the error decides
    assert squared_error(exact, spec, -high, high) <= errors[best] * 1.01
    if spec.bits < 8 and exact.mean() > -1:  # a narrow peak fits several grids equally well
        assert high == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("spec", [AFFINE8, AFFINE4], ids=str)
def test_mse_of_both_ends_beats_every_shrunken_range(spec: TensorSpec, values: torch.Tensor) -> None:
    exact = values[:20_000].double().numpy()
    low, high = choose_range(counted(values[:20_000]), spec, "mse")
    assert low <= 0 <= high
    smallest, largest = min(exact.min(), 0), max(exact.max(), 0)
    candidates = [squared_error(exact, spec, smallest * a, largest * b) for a in SHARES for b in SHARES]
    assert squared_error(exact, spec, low, high) <= min(candidates) * 1.02


SHARES = np.linspace(0.02, 1, 50)


def test_lsq_starts_where_its_paper_says() -> None:
    values = VALUES["heavy tails"]
    _, high = choose_range(counted(values), INT4, "lsq")
    assert high / 7 == pytest.approx(2 * values.abs().double().mean().item() / 7**0.5, rel=1e-3)


def test_moving_average_follows_the_images() -> None:
    images = torch.randn(9, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weights = 0.99 ** np.arange(8, -1, -1)
    for split in (1, 4, 9):
        calibrator = MovingAverageCalibrator()
        for batch in images.split(split):
            calibrator.observe(batch)
        low, high = choose_range(calibrator, AFFINE8, "moving-average")
        assert high == pytest.approx(np.average(images.amax((1, 2, 3)), weights=weights))
        assert low == pytest.approx(np.average(images.amin((1, 2, 3)), weights=weights))
    with pytest.raises(ValueError, match="MovingAverageCalibrator"):
        choose_range(counted(images), AFFINE8, "moving-average")


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse", "lsq"])
def test_ranges_do_not_depend_on_the_split_into_batches(method: str) -> None:
    values = heavy_tailed(20_000)
    results = set()
    for batches in (values.split(7), values.split(1000), values.flip(0).split(3_333), [values]):
        calibrator = MseCalibrator()
        for batch in batches:
            calibrator.observe(batch)
        results.add((choose_range(calibrator, INT8, method, 99.9), choose_range(calibrator, AFFINE4, method, 99.9)))
    assert len(results) == 1


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(1, 9),
)
def test_counts_are_those_of_the_quotients(values: np.ndarray, batches: int) -> None:
    histogram = counted(torch.from_numpy(values), batches).histogram
    quotients = np.trunc(values.astype(np.float64) / histogram.width).astype(int)
    assert np.array_equal(histogram.counts.numpy(), np.bincount(quotients + BINS - 1, minlength=2 * BINS - 1))
    assert histogram.seen == (values.min(), values.max())


def test_channels_last_and_strided_tensors_are_counted_alike() -> None:
    x = heavy_tailed(4 * 6 * 5 * 8).reshape(4, 6, 5, 8)
    expected = counted(x).histogram.counts
    assert torch.equal(counted(x.contiguous(memory_format=torch.channels_last)).histogram.counts, expected)
    assert torch.equal(counted(x.transpose(1, 3)).histogram.counts, expected)


def test_memory_and_counts_do_not_grow_with_batches() -> None:
    calibrator = MseCalibrator()
    for step in range(50):
        calibrator.observe(heavy_tailed(1000) * 2.0**step)  # a growing range all the way
    assert calibrator.histogram.counts.shape == (2 * BINS - 1,)
    assert calibrator.histogram.counts.dtype == torch.int64
    assert calibrator.histogram.counts.sum().item() == 50 * 1000


def test_counts_are_exact_beyond_float32_integers() -> None:
    values = torch.ones(2**24 + 3)
    values[-1] = 2.5
    histogram = counted(values, 1).histogram
    assert histogram.counts[BINS - 1 + BINS // 4].item() == 2**24 + 2
    assert histogram.counts.sum().item() == 2**24 + 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_two_halves_of_the_data_merge_to_the_whole(method: str, values: torch.Tensor) -> None:
    images = values[:10_000].reshape(50, 200)
    whole, first, second, joined = (METHODS[method]() for _ in range(4))
    whole.observe(images)
    first.observe(images[:20])
    second.observe(images[20:])
    for part in (first, second, METHODS[method]()):  # one process without images
        assert part.state().dtype == torch.float64
        assert part.state().shape == whole.state().shape
        joined.merge(part.state())
    tolerance = 1e-12 if method == "moving-average" else 0  # its sums are rounded in another order
    assert joined.seen == pytest.approx(whole.seen, rel=tolerance)
    for spec in (INT8, AFFINE4):
        assert joined.range(spec) == pytest.approx(whole.range(spec), rel=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_process_that_saw_nan_or_infinity_spoils_the_whole(method: str, bad: float) -> None:
    first, second, joined = (METHODS[method]() for _ in range(3))
    first.observe(torch.tensor([[1.0, 2.0]]))
    second.observe(torch.tensor([[1.0, bad]]))
    for part in (second, first):
        joined.merge(part.state())
    assert not all(map(np.isfinite, joined.seen))


def test_max_holds_all_batches() -> None:
    calibrator = MaxCalibrator()
    for batch in ([0.5, -7.25], [3.0, 1.0]):
        calibrator.observe(torch.tensor(batch))
    assert choose_range(calibrator, INT8, "max") == (-7.25, 7.25)
    assert choose_range(calibrator, UINT8, "max")[1] == 3
    assert choose_range(calibrator, AFFINE8, "max") == (-7.25, 3)


@pytest.mark.parametrize("method", ["max", "percentile", "moving-average"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_observing_nothing_nan_or_infinity_is_not_hidden(method: str, bad: float) -> None:
    calibrator = METHODS[method]()
    assert not all(map(np.isfinite, calibrator.seen))
    calibrator.observe(torch.tensor([[1.0, bad]]))
    calibrator.observe(torch.tensor([[1.0, 2.0]]))
    assert not all(map(np.isfinite, calibrator.seen))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_zeros_give_a_range_of_zero(method: str, preset: str) -> None:
    calibrator = METHODS[method]()
    calibrator.observe(torch.zeros(2, 5))
    low, high = choose_range(calibrator, PRESETS[preset].activation, method, 99.99)
    assert low == high == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_calibrates_every_preset(method: str, preset: str) -> None:
    model = tiny(preset)
    images = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(images)
        calibrate(model, images.split(4), method)
        assert all(quantizer.enabled for _, quantizer in quantizers(model))
        error = (model(images) - expected).norm() / expected.norm()
    assert 0 < error < (0.05 if preset.startswith("w8") and method in ("max", "percentile", "mse") else 1)


def test_tensors_that_several_quantizers_see_are_counted_once() -> None:
    shared = SeenTensors()
    x = torch.randn(5)
    first = shared.histogram(x)
    assert shared.histogram(x) is first
    assert shared.histogram(x.clone()) is not first
    x.mul_(2)
    assert shared.histogram(x) is not first


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_ranges_by_squared_error_beat_the_largest_magnitude(bits: int) -> None:
    weight = heavy_tailed(4 * 27 * 8).reshape(8, 12, 3, 3)
    spec = TensorSpec(bits=bits, per_channel=True)
    _, amax = MseCalibrator().weight_range(weight, spec)
    for channel, end in zip(weight.double().numpy(), amax.flatten().tolist(), strict=True):
        largest = np.abs(channel).max()
        errors = [squared_error(channel, spec, 0, largest * share / 100) for share in range(1, 101)]
        assert squared_error(channel, spec, 0, end) == pytest.approx(min(errors), rel=1e-3)


class SixSigma(Calibrator):
    """A calibrator of one's own: six root mean squares for activations, three for weights."""

    def __init__(self, sigmas: float = 6) -> None:
        self.sigmas, self.sums = sigmas, torch.zeros(2, dtype=torch.float64)

    def observe(self, x: torch.Tensor) -> None:
        self.sums += torch.tensor([x.double().square().sum().item(), x.numel()])

    @property
    def seen(self) -> tuple[float, float]:
        return self.range(INT8)

    def state(self) -> torch.Tensor:
        return self.sums

    def merge(self, state: torch.Tensor) -> None:
        self.sums = self.sums + state

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        amax = self.sigmas * (self.sums[0] / self.sums[1]).sqrt().item()
        return -amax, amax

    def weight_range(self, weight: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
        amax = 3 * weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        return -amax, amax


def test_the_method_may_be_a_class_or_make_calibrators() -> None:
    model = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), target="tensorrt")
    images = torch.randn(6, 3, 8, 8)
    root = images.double().square().mean().sqrt().item()
    for method, sigmas in ((SixSigma, 6), (partial(SixSigma, 2.5), 2.5)):
        calibrate(model, images.split(4), method)
        assert model[0]._input_quantizer.amax.item() == pytest.approx(sigmas * root)
        expected = 3 * model[0].weight.detach().square().mean((1, 2, 3)).sqrt()
        assert torch.allclose(model[0]._weight_quantizer.amax.flatten(), expected)
    calibrate(model, images.split(4), partial(PercentileCalibrator, 80.0))
    expected = np.percentile(images.abs().double().numpy(), 80, method="inverted_cdf")
    assert model[0]._input_quantizer.amax.item() == pytest.approx(expected, abs=1.01 * width(images))


class TwoInputs(nn.Module):
    """Takes an image and a dict with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(36, 2)

    def forward(self, image: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.norm(self.conv(image)).mean((2, 3)) + self.linear(sides["left"])[:, :1]


def test_a_batch_may_be_a_tuple_of_the_models_arguments() -> None:
    torch.manual_seed(0)
    images, left = torch.randn(6, 3, 8, 8), torch.randn(6, 36)
    batches = [(images[part], {"left": left[part], "camera": "front"}) for part in (slice(0, 4), slice(4, 6))]
    model = quantize(TwoInputs(), target="tensorrt")
    seen: list[int] = []
    calibrate(model, batches, method="max", progress=seen.append)
    assert seen == [4, 2]
    assert model.conv._input_quantizer.amax.item() == images.abs().max().item()
    assert model.linear._input_quantizer.amax.item() == left.abs().max().item()
    collected = collect(model, batches)
    assert collected["linear._input_quantizer"].seen == (left.min().item(), left.max().item())
    track_outputs(model, batches, seen.append)
    assert seen == [4, 2, 4, 2]
    reestimate_batch_norm(model, batches)
    with torch.no_grad():
        outputs = [model.conv(batch[0]).mean((0, 2, 3)) for batch in batches]
    expected = (4 * outputs[0] + 2 * outputs[1]) / 6
    assert torch.allclose(model.norm.running_mean, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (None, "not a NoneType"),
        (("a", 1), "a tuple without"),
        (torch.tensor(1.0), "a single number"),
    ],
)
def test_what_is_no_batch_is_said(batch: object, said: str) -> None:
    model = tiny()
    for use in (calibrate, collect, track_outputs, reestimate_batch_norm):
        with pytest.raises(UserError, match=rf"a batch must be a tensor.*{said}.*pass the images alone"):
            use(model, [batch])
    assert not any(quantizer.enabled for _, quantizer in quantizers(model))


def test_the_report_has_the_true_clipping_and_noise() -> None:
    torch.manual_seed(3)
    model = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), "w8a8-affine")
    images = torch.randn(8, 3, 32, 32)
    collected = collect(model, images.split(3), "percentile")
    set_ranges(model, collected, "percentile", 99.0)
    activation, weight = report_ranges(model, collected)
    assert activation.name == "0._input_quantizer"
    assert activation.grid == "uint8, affine, per tensor"
    assert activation.seen == (images.min().item(), images.max().item())
    assert activation.clipped == pytest.approx(0.01, abs=2e-3)
    quantizer = model[0]._input_quantizer
    noise = (quantizer(images) - images).double().square().mean()
    assert activation.sqnr == pytest.approx(10 * torch.log10(images.double().square().mean() / noise).item(), abs=0.1)
    assert weight.clipped == 0
    noise = (model[0]._weight_quantizer(model[0].weight) - model[0].weight).double().square().mean()
    assert weight.sqnr == pytest.approx(
        10 * torch.log10(model[0].weight.double().square().mean() / noise).item(), abs=1e-3
    )
    assert set(activation.to_json()) == {"name", "grid", "seen", "chosen", "clipped", "sqnr"}


def test_calibrate_sees_float_inputs_and_weights_per_channel() -> None:
    model, images = tiny(), torch.randn(6, 3, 8, 8)
    assert calibrate(model, images.split(4), method="max") is model
    places = dict(quantizers(model))
    assert places["0._input_quantizer"].amax.item() == images.abs().max().item()
    assert torch.equal(places["0._weight_quantizer"].amax.flatten(), model[0].weight.abs().amax((1, 2, 3)))
    with torch.no_grad():
        pooled = nn.functional.conv2d(images, model[0].weight, model[0].bias).relu().mean((2, 3))
    assert places["4._input_quantizer"].amax.item() == pytest.approx(pooled.abs().max().item(), rel=1e-6)
    assert all(quantizer.enabled for quantizer in places.values())


def test_calibrate_restores_modes_and_reports_progress() -> None:
    model = tiny().train()
    model[1].eval()
    seen: list[int] = []
    calibrate(model, torch.randn(6, 3, 8, 8).split(4), progress=seen.append)
    assert seen == [4, 2]
    assert model.training
    assert not model[1].training


def test_recalibrating_gives_the_same_ranges() -> None:
    model, batches = tiny(), torch.randn(6, 3, 8, 8).split(4)
    calibrate(model, batches)
    first = {name: quantizer.amax.clone() for name, quantizer in quantizers(model)}
    calibrate(model, batches)
    assert all(torch.equal(first[name], quantizer.amax) for name, quantizer in quantizers(model))


def test_what_can_go_wrong_is_said() -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(UserError, match="no images"):
        calibrate(tiny(), [])
    with pytest.raises(UserError, match=r"'magic'.*max, percentile"):
        calibrate(tiny(), [images], method="magic")
    with pytest.raises(UserError, match="at most 100"):
        calibrate(tiny(), [images], percentile=101)
    with pytest.raises(UserError, match="no quantizers"):
        calibrate(nn.Conv2d(3, 4, 3), [images])
    model = tiny()
    with pytest.raises(UserError, match="batch 1 holds NaN"):
        calibrate(model, [images * torch.nan])
    assert not any(quantizer.enabled for _, quantizer in quantizers(model))
