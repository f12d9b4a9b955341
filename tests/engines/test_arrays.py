"""What an engine is called with: NaN, lists of unequal lengths, arrays that fill the memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effnet_quant import create_model, export_onnx, load_engine
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.engines.signature import has_nan
from effnet_quant.errors import UserError
from effnet_quant.models.weights import write_weights

SHAPE = (1, 3, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    torch.manual_seed(0)
    model = create_model("cifar-resnet20", 3).eval()
    export_onnx(model, folder / "m.onnx", 16)
    card = ModelCard(arch="cifar-resnet20", input=InputSpec(16, 16))
    write_weights(folder / "m.safetensors", model.state_dict(), card)
    return folder


BACKENDS = {"onnxruntime": "m.onnx", "openvino": "m.onnx", "torch": "m.safetensors"}


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request, folder):
    pytest.importorskip(request.param)
    return load_engine(folder / BACKENDS[request.param], request.param, threads=1)


def one_nan(place):
    images = np.zeros(SHAPE, np.float32)
    images.flat[place] = np.nan
    return images


@pytest.mark.parametrize("place", [0, 383, 767])
def test_images_with_nan_are_refused(engine, place):
    with pytest.raises(UserError, match=r"the images hold NaN.*allow_nan=True"):
        engine(one_nan(place))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_with_nan_pass_where_that_is_allowed(folder, backend):
    pytest.importorskip(backend)
    engine = load_engine(folder / BACKENDS[backend], backend, threads=1, allow_nan=True)
    assert engine(one_nan(3)).shape == (1, 3)


@given(
    arrays(
        st.sampled_from(["float16", "float32", "float64", "uint8", "int64", "bool"]),
        st.tuples(st.integers(1, 3), st.integers(1, 9)),
    )
)
def test_nan_is_found_in_every_type(array):
    assert has_nan(array) == (array.dtype.kind == "f" and bool(np.isnan(array).any()))
    assert has_nan(array[:, ::-1]) == has_nan(array)


@pytest.mark.parametrize(
    "array",
    [
        [[1.0, 2.0], [3.0]],
        [[[[1.0]]], [[1.0, 2.0]]],
        None,
        "images",
        {},
        np.zeros(SHAPE, complex),
        np.zeros(SHAPE),
        np.zeros(SHAPE, "U3"),
        np.array([{}]),
        torch.zeros(SHAPE, requires_grad=True),
        torch.zeros(SHAPE, device="meta"),
        torch.zeros(SHAPE, dtype=torch.bfloat16),
    ],
    ids=lambda array: f"{type(array).__name__} {getattr(array, 'dtype', '')}",
)
def test_what_is_no_array_of_images_is_refused(engine, array):
    with pytest.raises(UserError, match="the engine takes"):
        engine(array)


def test_an_array_that_repeats_numbers_to_fill_the_memory_is_refused(engine):
    with pytest.raises(UserError, match="repeats a few numbers to fill"):
        engine(np.broadcast_to(np.float32(0), (10**9, *SHAPE[1:])))


@pytest.mark.parametrize("batch_size", [0, -1, 10**12])
def test_a_batch_that_no_machine_holds_is_refused(engine, batch_size):
    with pytest.raises(UserError, match=f"a batch of {batch_size} would have the shape"):
        engine.warm_up(batch_size)
