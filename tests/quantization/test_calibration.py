"""Calibration against numpy on all values at once."""

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.quantization.calibration.maximum import MaxObserver
from effnet_quant.quantization.calibration.percentile import BINS, PercentileObserver
from effnet_quant.quantization.insertion import quantizers


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return quantize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    )


def heavy_tailed(count: int = 200_000) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_t(3, count).astype(np.float32))


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_numpys_within_a_bin(percentile: float) -> None:
    values = heavy_tailed()
    observer = PercentileObserver(percentile)
    for batch in values.chunk(7):
        observer.observe(batch)
    largest = values.abs().max().item()
    bin_width = 2 ** np.ceil(np.log2(largest)) / BINS
    expected = np.percentile(np.abs(values.numpy().astype(np.float64)), percentile, method="inverted_cdf")
    assert observer.amax().item() == pytest.approx(expected, abs=1.01 * bin_width)
    assert observer.amax().item() <= largest


def test_ranges_do_not_depend_on_the_split_into_batches() -> None:
    values = heavy_tailed(20_000)
    results = set()
    for batches in (values.split(7), values.split(1000), values.flip(0).split(3_333), [values]):
        observer = PercentileObserver(99.9)
        for batch in batches:
            observer.observe(batch)
        results.add(observer.amax().item())
    assert len(results) == 1


def test_memory_and_counts_do_not_grow_with_batches() -> None:
    observer = PercentileObserver(99.0)
    for step in range(50):
        observer.observe(heavy_tailed(1000) * 2.0**step)  # a growing range all the way
    assert observer._counts is not None
    assert observer._counts.shape == (BINS,)
    assert observer._counts.dtype == torch.int64
    assert observer._counts.sum().item() == 50 * 1000


def test_counts_stay_exact_beyond_float32_integers() -> None:
    observer = PercentileObserver(100.0)
    observer.observe(torch.ones(1))
    observer._counts = observer._counts * (2**24)  # type: ignore[operator]
    observer.observe(torch.ones(1))
    assert observer._counts.sum().item() == 2**24 + 1


def test_max_is_the_largest_magnitude_of_all_batches() -> None:
    observer = MaxObserver()
    for batch in ([0.5, -7.25], [3.0, 1.0]):
        observer.observe(torch.tensor(batch))
    assert observer.amax().item() == 7.25


@pytest.mark.parametrize("observer", [MaxObserver(), PercentileObserver(99.0)])
def test_observing_nothing_gives_nan_and_infinity_is_not_hidden(observer: MaxObserver | PercentileObserver) -> None:
    assert torch.isnan(observer.amax())
    observer.observe(torch.tensor([1.0, torch.inf]))
    assert torch.isinf(observer.amax())


def test_zeros_give_a_range_of_zero() -> None:
    observer = PercentileObserver(99.99)
    observer.observe(torch.zeros(10))
    assert observer.amax().item() == 0


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
    with pytest.raises(UserError, match=r"0\._input_quantizer.*saw NaN"):
        calibrate(model, [images * torch.nan])
    assert not any(quantizer.enabled for _, quantizer in quantizers(model))
