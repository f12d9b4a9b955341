"""Tuning keeps what pays. The engines here are waits of a known length, so that the answer is known."""

import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effnet_quant import UserError, quantize
from effnet_quant.checks.tuning import format_tuning, tune
from effnet_quant.models.layers import ConvBNAct
from effnet_quant.quantization.targets import Target, get_target

RULES = get_target("onnxruntime")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    unit = ConvBNAct(8, 8, 3, groups=8, bn_momentum=0.1, bn_epsilon=1e-3)
    return quantize(nn.Sequential(nn.Conv2d(3, 8, 3), unit, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))


class Engine:
    """Waits so many milliseconds."""

    def __init__(self, length: float) -> None:
        self.length = length

    def __call__(self) -> None:
        time.sleep(self.length / 1e3)


def waits(
    milliseconds: dict[str, float], in_float: float, bf16: float = 0, alive: list[int] | None = None
) -> Callable[[Target, str], Callable[[], None]]:
    """An engine takes 40 ms, plus ``milliseconds`` for each of these operations that is left in float, or ``in_float``; and
    ``bf16`` more in that precision. ``alive`` gets how many engines there are when one more is made."""
    engines: weakref.WeakSet[Engine] = weakref.WeakSet()

    def compile_for(rules: Target, precision: str) -> Callable[[], None]:
        left = RULES.quantized - rules.quantized
        length = in_float if not rules.quantized else 40 + sum(milliseconds.get(name, 0) for name in left)
        engine = Engine(length + bf16 * (precision == "bf16"))
        engines.add(engine)
        if alive is not None:
            alive.append(len(engines))
        return engine

    return compile_for


@pytest.mark.slow
def test_what_pays_is_left_in_float_alone_and_together(model: nn.Module) -> None:
    said: list[str] = []
    alive: list[int] = []
    tuning = tune(model, RULES, waits({"depthwise": -12, "silu": -9, "pool": 10}, 80, alive=alive), said.append)
    assert max(alive) <= 4  # the finalists; a large network's candidates would not all fit into memory
    assert RULES.quantized - tuning.target.quantized == {"depthwise", "silu"}
    assert tuning.chosen == "depthwise in float + silu in float"
    assert 2 < tuning.speedup < 5  # 80 over 19
    assert [line.split(" ", 1)[0] for line in said[:-1]] == [f"{count}/7" for count in range(1, 8)]
    assert format_tuning(tuning).splitlines()[1].endswith("<- chosen")


@pytest.mark.slow
def test_what_does_not_pay_stays_integer(model: nn.Module) -> None:
    tuning = tune(model, RULES, waits({"silu": 10, "pool": 10}, 30), lambda line: None)
    assert tuning.target == RULES
    assert tuning.chosen == "target's own"
    assert tuning.speedup < 1


@pytest.mark.slow
def test_the_precision_is_chosen_first_and_float_gets_its_best(model: nn.Module) -> None:
    others = dict.fromkeys(("stem", "depthwise", "linear", "pool"), 20.0)  # far from what a busy machine adds
    tuning = tune(model, RULES, waits({"silu": -15, **others}, 45, bf16=-10), print, ("fp32", "bf16"))
    assert (tuning.chosen, tuning.precision) == ("silu in float, bf16", "bf16")
    assert 1.8 < tuning.speedup < 2.8  # 35, float in bf16, over 15
    assert {"target's own", "target's own, bf16", "float", "float, bf16"} < set(tuning.seconds)


def test_a_float_network_has_nothing_to_tune() -> None:
    with pytest.raises(UserError, match="nothing to tune"):
        tune(torch.nn.Conv2d(3, 4, 3), RULES, waits({}, 1), print)
