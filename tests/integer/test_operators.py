"""Every step on random integers: NumPy, the fast executor and ONNX Runtime against loops over Python's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_quant.integer import reference
from effnet_quant.integer.arithmetic import LEFT_SHIFT
from effnet_quant.integer.fast import FastProgram
from effnet_quant.integer.onnx_graph import float_tensors
from effnet_quant.integer.program import (
    IMAGE,
    LOGITS,
    Concat,
    Convolution,
    Linear,
    Maximum,
    Move,
    Product,
    Program,
    Rescale,
    Step,
    Sum,
    Table,
    WindowSum,
    proof_of,
)
from effnet_quant.integer.storage import from_model, to_model
from reference import plain_integers as plain

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)
onnxruntime.set_default_logger_severity(3)


def executed(images: np.ndarray, steps: list[Step], dimensions: int = 4) -> list[int]:
    """What all executors agree on, as a list. The steps come from a file, to which they were written."""
    program = Program(images.shape[1:], tuple(steps), 0.5, dimensions)
    model = to_model(program)
    assert not float_tensors(model.graph)
    program = from_model(model, "the file")
    expected = reference.run(program, images)
    fast = FastProgram(program)(images)
    (theirs,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {IMAGE: images})
    assert fast.dtype == theirs.dtype == np.int32
    np.testing.assert_array_equal(fast, expected)
    np.testing.assert_array_equal(theirs, expected)
    return expected.reshape(-1).tolist()


def widened(name: str, result: plain.Integers) -> tuple[Sum, list[int]]:
    """The step that makes sums of 8-bit integers, so that a program can end, and what it gives."""
    step = Sum((name,), LOGITS, (3,), (LEFT_SHIFT,), (2**30,), (30,))
    return step, plain.total([result], step).listed()


def drawn(seed: int, *sizes: int) -> tuple[np.random.Generator, np.ndarray]:
    """A generator, and uint8 images of these sizes, often at the ends of their range."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, sizes)
    images = np.where(generator.random(sizes) < 0.3, 255 * generator.integers(0, 2, sizes), images)
    return generator, images.astype(np.uint8)


def window(generator: np.random.Generator) -> dict[str, Any]:
    kernel = tuple(int(size) for size in generator.integers(1, 4, 2))
    pads = tuple(int(generator.integers(0, size // 2 + 1)) for size in (*kernel, *kernel))
    return {"kernel": kernel, "strides": tuple(map(int, generator.integers(1, 3, 2))), "pads": pads}


def multipliers(generator: np.random.Generator, *sizes: int, least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return generator.integers(2**30, 2**31, sizes), generator.integers(least, 63, sizes)


@few
@given(SEEDS, st.integers(0, 2), st.integers(0, 255))
def test_convolution(seed: int, kind: int, zero_point: int) -> None:
    generator, images = drawn(seed, 2, 4, 5, 6)
    groups = (1, 2, 4)[kind]
    place = window(generator)
    weight = generator.integers(0, 256, (8, 4 // groups, *place["kernel"])).astype(np.uint8)
    bias = generator.integers(-(10**6), 10**6, 8).astype(np.int32)
    dilations = tuple(map(int, generator.integers(1, 3, 2)))
    proof = proof_of(weight, bias, zero_point, 0)
    step = Convolution(
        IMAGE, LOGITS, zero_point, weight, bias, place["strides"], place["pads"], dilations, groups, proof
    )
    assert executed(images, [step]) == plain.convolution(plain.Integers.of(images), step).listed()


@few
@given(SEEDS, st.integers(0, 255))
def test_linear(seed: int, zero_point: int) -> None:
    generator, images = drawn(seed, 3, 2, 2, 7)
    weight = generator.integers(0, 256, (7, 5)).astype(np.uint8)
    bias = generator.integers(-(2**30), 2**30, 5).astype(np.int32)  # beyond 2**24: float64 in the fast executor
    step = Linear(IMAGE, LOGITS, zero_point, weight, bias, proof_of(weight, bias, zero_point, 1))
    assert executed(images, [step]) == plain.linear(plain.Integers.of(images), step).listed()


@few
@given(SEEDS, st.booleans())
def test_table(seed: int, per_channel: bool) -> None:
    generator, images = drawn(seed, 2, 3, 2, 4)
    step = Table(IMAGE, "t", generator.integers(0, 256, 256 * (3 if per_channel else 1)).astype(np.uint8), 2)
    last, expected = widened("t", plain.table(plain.Integers.of(images), step))
    assert executed(images, [step, last]) == expected


@few
@given(SEEDS, st.booleans(), st.integers(0, 255))
def test_sums_of_windows(seed: int, whole: bool, zero_point: int) -> None:
    generator, images = drawn(seed, 2, 3, 5, 4)
    place = window(generator)
    if whole:
        place = {"kernel": (0, 0), "strides": (1, 1), "pads": (0, 0, 0, 0)}
    terms = 20 if whole else place["kernel"][0] * place["kernel"][1]
    step = WindowSum(IMAGE, LOGITS, zero_point, terms=terms, **place)
    assert executed(images, [step]) == plain.window_sum(plain.Integers.of(images), step).listed()


@few
@given(SEEDS)
def test_maximum(seed: int) -> None:
    generator, images = drawn(seed, 2, 3, 5, 6)
    step = Maximum(IMAGE, "m", dilations=(1, 1), **window(generator))
    last, expected = widened("m", plain.maximum(plain.Integers.of(images), step))
    assert executed(images, [step, last]) == expected


@few
@given(SEEDS, st.tuples(st.integers(0, 255), st.integers(0, 255)))
def test_product(seed: int, zero_points: tuple[int, int]) -> None:
    _, images = drawn(seed, 2, 3, 2, 4)
    narrow = Move(IMAGE, "narrow", "slice", (3, 1, 2, 1))
    step = Product((IMAGE, "narrow"), LOGITS, zero_points)
    expected = plain.product(plain.Integers.of(images), plain.Integers.of(images[:, :, :, 1:2]), step)
    assert executed(images, [narrow, step]) == expected.listed()


@few
@given(SEEDS, st.tuples(st.integers(0, 255), st.integers(0, 255)))
def test_sum(seed: int, zero_points: tuple[int, int]) -> None:
    """Of two 8-bit operands and a product."""
    generator, images = drawn(seed, 2, 3, 2, 4)
    product = Product((IMAGE, IMAGE), "p", zero_points)
    numbers, shifts = generator.integers(2**30, 2**31, 3), generator.integers(31, 40, 3)
    step = Sum(
        (IMAGE, IMAGE, "p"),
        LOGITS,
        (*zero_points, 0),
        (LEFT_SHIFT, LEFT_SHIFT, 0),
        tuple(map(int, numbers)),
        tuple(map(int, shifts)),
    )
    x = plain.Integers.of(images)
    assert executed(images, [product, step]) == plain.total([x, x, plain.product(x, x, product)], step).listed()


@few
@given(SEEDS, st.integers(0, 255), st.booleans(), st.integers(0, 2**31 - 9_000_000))
def test_rescale(seed: int, zero_point: int, per_channel: bool, largest: int) -> None:
    """Of sums up to the largest that fit 32 bits, with any shift."""
    generator, images = drawn(seed, 2, 3, 2, 4)
    weight = generator.integers(0, 256, (4, 3, 1, 1)).astype(np.uint8)
    bias = np.array([largest, -largest, 0, largest // 2], np.int32)
    proof = proof_of(weight, bias, 7, 0)
    layer = Convolution(IMAGE, "c", 7, weight, bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, proof)
    numbers = multipliers(generator, *((4, 1, 1) if per_channel else ()))
    low, high = sorted(int(end) for end in generator.integers(0, 256, 2))
    step = Rescale("c", "r", *numbers, zero_point, low, high, "uint8")
    last, expected = widened("r", plain.rescale(plain.convolution(plain.Integers.of(images), layer), step))
    assert executed(images, [layer, step, last]) == expected
    whole = Rescale("c", LOGITS, *multipliers(generator, least=31), 0, -(2**31), 2**31 - 1, "int32")
    assert (
        executed(images, [layer, whole])
        == plain.rescale(plain.convolution(plain.Integers.of(images), layer), whole).listed()
    )


@few
@given(SEEDS)
def test_values_that_move(seed: int) -> None:
    _, images = drawn(seed, 2, 4, 3, 5)
    steps = [
        Move(IMAGE, "padded", "pad", (9, 0, 0, 1, 0, 0, 2, 1, 1)),
        Move("padded", "cut", "slice", (3, 0, 7, 2)),
        Move("cut", "taken", "gather", (2, 4, 0, 0, 3)),
        Move("taken", "turned", "transpose", (0, 3, 1, 2)),
        Concat(("turned", "turned"), "joined", 1),
        Move("joined", "flat", "reshape", (-1, 160)),
    ]
    moved = np.pad(images, ((0, 0), (1, 0), (0, 2), (1, 1)), constant_values=9)
    moved = moved[:, :, :, ::2][:, :, [4, 0, 0, 3]].transpose(0, 3, 1, 2)
    half = plain.Integers.of(moved)
    joined = plain.concatenated([half, half], steps[4])
    flat = plain.Integers.of(np.array(joined.listed()).reshape(2, 160))
    last, expected = widened("flat", flat)
    assert executed(images, [*steps, last], 2) == expected


@pytest.mark.parametrize("bias", [2**31 - 1, 2**31 - 255 * 128])
def test_sums_that_do_not_fit_are_refused(bias: int) -> None:
    weight, biases = np.zeros((1, 1), np.uint8), np.array([bias], np.int32)
    step = Linear(IMAGE, LOGITS, 0, weight, biases, proof_of(weight, biases, 0, 1))
    with pytest.raises(ValueError, match=r"logits has sums of up to 2147.*, which do not fit 32 bits"):
        to_model(Program((1, 1, 1), (step,), 1.0))


def test_sums_just_below_the_limit_are_exact() -> None:
    weight, biases = (
        np.array([[0, 255]], np.uint8),
        np.array([-(2**31) + 255 * 128 + 1, 2**31 - 255 * 128 - 1], np.int32),
    )
    layer = Linear(IMAGE, "c", 0, weight, biases, proof_of(weight, biases, 0, 1))
    steps = [layer, Rescale("c", "r", np.array(2**31 - 1), np.array(62), 200, 0, 255, "uint8")]
    images = np.full((1, 1, 1, 1), 255, np.uint8)
    results = plain.rescale(plain.linear(plain.Integers.of(images), layer), steps[1])
    last, expected = widened("r", results)
    assert executed(images, [*steps, last]) == expected
    whole = Rescale("c", LOGITS, np.array(2**31 - 1), np.array(31), 0, -(2**31), 2**31 - 1, "int32")
    assert (
        executed(images, [layer, whole])
        == plain.rescale(plain.linear(plain.Integers.of(images), layer), whole).listed()
    )
