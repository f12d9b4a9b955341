"""Serves an engine over the Open Inference Protocol (v2), HTTP and gRPC, with KServe's Python server.

The protocol: https://github.com/kserve/open-inference-protocol. Tensors after the JSON part of an HTTP request are its
binary tensor data extension.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server
from kserve.errors import InvalidInput
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from numpy.typing import NDArray
from prometheus_client import Histogram

from effnet_quant.data.decoding import DecodeError, decode
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.engines.engine import Engine
from effnet_quant.errors import UserError
from effnet_quant.serving.batching import Batcher
from effnet_quant.structure import map_leaves
from effnet_quant.tasks import get_task

IMAGE = "image"  # the input that takes files
CLASSES_IN_AN_ANSWER = 5
LARGEST_REQUEST = 256 * 2**20  # bytes of a body
_DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
_HEADER = "inference-header-content-length"
_BATCH_IMAGES = Histogram(
    "effnet_quant_batch_images", "images that the engine runs together", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)


def serve(
    engine: Engine, *, name: str | None, http_port: int, grpc_port: int, max_batch: int, queue_delay_us: int
) -> None:
    """Serve a classifier until SIGTERM or SIGINT. Requests that have come in by then are answered.

    Args:
        engine: takes one image, and names classes.
        name: of the model; None for the file's.
        http_port: for HTTP and the metrics; free, as ``check_port`` says.
        grpc_port: for gRPC, free too.
        max_batch: images in a batch and in a request, at most.
        queue_delay_us: how long a request waits for others if the engine is idle, in microseconds.

    Raises:
        UserError: the engine is no image classifier, or a value is invalid.
    """
    if len(engine.inputs) != 1 or not engine.input.is_image or engine.card.task != "classification":
        raise UserError(f"{engine.path} is no image classifier, which alone can be served.")
    if max_batch < 1 or queue_delay_us < 0:
        raise UserError("the largest batch must be at least 1, and the delay must not be negative.")
    for batch in {1, max_batch}:
        engine.warm_up(batch)
    model = _Classifier(name or Path(engine.path).stem, engine, max_batch, queue_delay_us / 1e6)
    model_server.args.grpc_max_receive_message_length = LARGEST_REQUEST
    model_server.app.add_exception_handler(RequestValidationError, _refuse_body)
    model_server.app.middleware("http")(_limit_body)
    server = ModelServer(http_port=http_port, grpc_port=grpc_port, enable_latency_logging=False)
    server.dataplane = _BinaryDataPlane(model_registry=server.registered_models)
    server.model_repository_extension = _FixedModels(server.registered_models)
    for logger in ("kserve", "kserve.trace", "uvicorn", "uvicorn.access"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger("kserve").addFilter(_is_ours_to_mend)
    model.load()
    server.start([model])


class _Classifier(Model):
    """An engine as KServe's model: files or tensors in, names and probabilities of classes out."""

    def __init__(self, name: str, engine: Engine, max_batch: int, delay: float) -> None:
        super().__init__(name)
        self._engine, self._most = engine, max_batch
        self._spec = engine.image_spec
        self._transform = evaluation_transform(self._spec)
        self._batcher = Batcher(self._run, max_batch, delay, _BATCH_IMAGES.observe)

    def get_input_types(self) -> list[dict[str, Any]]:
        """The two inputs; a request has one of them."""
        taken = self._engine.input
        shape = [-1, *(-1 if size is None else size for size in taken.shape)]
        return [
            {"name": IMAGE, "datatype": "BYTES", "shape": [-1]},
            {"name": taken.name, "datatype": _DATATYPES[taken.dtype], "shape": shape},
        ]

    def get_output_types(self) -> list[dict[str, Any]]:
        """The likeliest classes, the likeliest first."""
        return [
            {"name": "classes", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, -1]},
        ]

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        """Answer a request.

        Raises:
            InvalidInput: it can't be answered; KServe makes it status 400, or INVALID_ARGUMENT.
        """
        try:
            array = await asyncio.to_thread(self._prepared, payload)
            answers = await self._batcher(array)
        except UserError as error:
            raise InvalidInput(str(error)) from error
        names = np.array([[entry["class"].encode() for entry in answer["top"]] for answer in answers], object)
        chances = np.array([[entry["probability"] for entry in answer["top"]] for answer in answers], np.float32)
        outputs = []
        for name, datatype, values in (("classes", "BYTES", names), ("probabilities", "FP32", chances)):
            output = InferOutput(name, list(values.shape), datatype)
            output.set_data_from_numpy(values, binary_data=True)
            outputs.append(output)
        return InferResponse(
            payload.id or uuid.uuid4().hex,  # KServe's answers in JSON need one
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    def _prepared(self, payload: InferRequest) -> NDArray[Any]:
        taken = self._engine.input
        if not isinstance(payload, InferRequest) or len(payload.inputs) != 1:
            raise UserError(f"a request has one input: '{IMAGE}' with files, or '{taken.name}' with a tensor.")
        (given,) = payload.inputs
        kind = "BYTES" if given.name == IMAGE else _DATATYPES[taken.dtype]
        if given.name not in (IMAGE, taken.name):
            raise UserError(f"there is no input '{given.name:.80}'; the inputs are '{IMAGE}' and '{taken.name}'.")
        if given.datatype != kind:
            raise UserError(f"the input '{given.name}' is of type {kind}, not {given.datatype:.20}.")
        try:
            array = given.as_numpy()
        except Exception as error:  # numpy and struct have several
            raise UserError(f"the data of '{given.name}' do not fill the shape {list(given.shape)}.") from error
        if array.ndim < 1 or not 1 <= len(array) <= self._most:
            raise UserError(f"a request has 1 to {self._most} images; the first dimension says how many.")
        if given.name == IMAGE:
            if array.ndim != 1:
                raise UserError(f"the input '{IMAGE}' has the shape [number of files].")
            array = self._decoded(array)
        (array,) = self._engine.check(array)
        return array

    def _decoded(self, files: NDArray[Any]) -> NDArray[Any]:
        pixels = []
        for number, file in enumerate(files):
            try:
                data = file if isinstance(file, bytes) else base64.b64decode(file, validate=True)
                pixels.append(self._transform(decode(np.frombuffer(bytearray(data), np.uint8))))
            except (DecodeError, binascii.Error, TypeError, ValueError) as error:
                reason = "no base64" if isinstance(file, str) and not isinstance(error, DecodeError) else "no image"
                raise UserError(f"file {number + 1} of '{IMAGE}' is {reason}; send JPEG, PNG or WebP.") from error
        stack = torch.stack(pixels)
        ready = stack if self._engine.input.dtype == "uint8" else normalize(stack, self._spec)
        return ready.numpy().astype(self._engine.input.dtype)

    def _run(self, array: NDArray[Any]) -> list[Any]:
        outputs = map_leaves(torch.from_numpy, self._engine.real(self._engine(array)))
        return get_task(self._engine.card.task).answers(outputs, self._engine.classes, CLASSES_IN_AN_ANSWER)


class _BinaryDataPlane(DataPlane):
    """Reads binary tensors of HTTP requests as they are.

    KServe's own reader turns them into lists of Python numbers, and refuses bytes that are no UTF-8, as all JPEGs.
    """

    def decode_inference_request(self, body: Any, headers: Any, model_name: str) -> InferRequest:
        """A request's body as KServe's class.

        Raises:
            InvalidInput: it is not in the protocol's form.
        """
        if not isinstance(body, bytes):
            return super().decode_inference_request(body, headers, model_name)
        try:
            length = int(headers.get(_HEADER, len(body)))
            values = orjson.loads(body[:length])
            (given,) = values["inputs"]
            parameters = given.get("parameters") or {}
            taken = InferInput(str(given["name"]), [int(size) for size in given["shape"]], str(given["datatype"]))
            size = int(parameters["binary_data_size"]) if "binary_data_size" in parameters else None
            taken.data = given.get("data") if size is None else None
            wanted = [RequestedOutput(entry["name"], entry.get("parameters")) for entry in values.get("outputs") or []]
            own = values.get("parameters") or {}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput("the body is no request of the Open Inference Protocol with one input.") from error
        if not 0 <= length <= len(body) or (size is not None and size != len(body) - length):
            raise InvalidInput("the body has not as many bytes as its headers and 'binary_data_size' say.")
        raw = None if size is None else [body[length:]]
        return InferRequest(model_name, [taken], values.get("id"), raw, parameters=own, request_outputs=wanted or None)


class _FixedModels(ModelRepositoryExtension):
    """Refuses to load and unload models: any client could take the model from all others."""

    async def load(self, model_name: str) -> dict[str, Any]:
        """Refuse.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput("this server keeps the model that it was started with.")

    unload = load


async def _refuse_body(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "the body is no request of the Open Inference Protocol."}, 400)


async def _limit_body(request: Request, answer: Any) -> Any:
    """Refuse a body before it is read; one without a length could have any."""
    if request.method == "POST":
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return JSONResponse({"error": "the request needs a Content-Length."}, 411)
        if int(length) > LARGEST_REQUEST:
            return JSONResponse({"error": f"a request has at most {LARGEST_REQUEST >> 20} MiB."}, 413)
    return await answer(request)


def _is_ours_to_mend(record: logging.LogRecord) -> bool:
    """Whether a log record is about anything but a client's mistake."""
    return not (record.exc_info and isinstance(record.exc_info[1], InvalidInput))
