"""effnet-quant serve, in a process of its own, asked by Triton's client over HTTP and gRPC."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_quant import UserError, create_model, export_onnx, load_engine
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.cli import serve as command
from effnet_quant.engines.deployment import Deployment, write_deployment

if importlib.util.find_spec("kserve") is None:
    pytest.skip("kserve is not installed: pip install effnet-quant[serve]", allow_module_level=True)
httpclient = pytest.importorskip(
    "tritonclient.http", reason="pip install tritonclient[http,grpc]", exc_type=ImportError
)
grpcclient = pytest.importorskip(
    "tritonclient.grpc", reason="pip install tritonclient[http,grpc]", exc_type=ImportError
)

CLASSES = ("ship", "Käfer", *"abcdefgh")
SIZE = 32


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]


def ask(url, data=None, headers=None):
    """Status and text of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    torch.manual_seed(0)
    card = ModelCard(classes=CLASSES, num_classes=10, input=InputSpec(SIZE, 36, mean=(0.5, 0.5, 0.5)))
    export_onnx(create_model("cifar-resnet20").eval(), folder / "net.onnx", SIZE, card=card)
    size = (folder / "net.onnx").stat().st_size
    return write_deployment(Deployment("net.onnx", size, "onnxruntime", "fp32", 1), folder)


class Server:
    def __init__(self, start_process, deployed, *flags):
        self.http, self.grpc = free_ports(2)
        ports = ("--http-port", self.http, "--grpc-port", self.grpc)
        self.process = start_process("effnet_quant/__main__.py", "serve", deployed, *ports, *flags, cwd=deployed.parent)
        self.url = f"http://127.0.0.1:{self.http}"
        for _ in range(600):
            with contextlib.suppress(OSError):
                if ask(f"{self.url}/v2/health/ready")[0] == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        pytest.fail(f"the server did not start: {self.process.communicate()}")

    def client(self, kind):
        module, port = (httpclient, self.http) if kind == "http" else (grpcclient, self.grpc)
        return module, module.InferenceServerClient(f"127.0.0.1:{port}")

    def infer(self, kind, name, array, datatype):
        module, client = self.client(kind)
        with contextlib.closing(client):
            given = module.InferInput(name, array.shape, datatype)
            given.set_data_from_numpy(array)
            answer = client.infer("net", [given])
            return answer.as_numpy("classes"), answer.as_numpy("probabilities")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="module")
def server(start_process, deployed):
    server = Server(start_process, deployed)
    yield server
    _, err = server.stop()
    assert server.process.returncode == 0, err
    assert "Traceback" not in err


def jpegs(count):
    generator = np.random.default_rng(1)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (50, 40, 3), np.uint8)).save(file, "jpeg")
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_files_and_tensors_are_answered_as_the_engine_answers(server, deployed, kind, tmp_path):
    files, engine = jpegs(3), load_engine(deployed)
    for number, file in enumerate(files):
        (tmp_path / f"{number}.jpg").write_bytes(file)
    expected = engine.predict([str(tmp_path / f"{number}.jpg") for number in range(3)])
    names, chances = server.infer(kind, "image", np.array(files, object), "BYTES")
    assert [[name.decode() for name in row] for row in names] == [[e["class"] for e in a["top"]] for a in expected]
    np.testing.assert_allclose(chances, [[e["probability"] for e in a["top"]] for a in expected], atol=1e-6)
    (images,) = engine.example_inputs(4)
    names, chances = server.infer(kind, engine.input.name, images, "FP32")
    assert [row[0].decode() for row in names] == [CLASSES[index] for index in engine(images).argmax(1)]
    np.testing.assert_allclose(chances[:, 0], torch.from_numpy(engine(images)).softmax(1).amax(1), atol=1e-6)


def test_a_request_in_json_takes_base64(server):
    file = base64.b64encode(jpegs(1)[0]).decode()
    body = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [file]}]}
    headers = {"Content-Type": "application/json"}
    status, text = ask(f"{server.url}/v2/models/net/infer", json.dumps(body).encode(), headers)
    assert status == 200, text
    outputs = {output["name"]: output for output in json.loads(text)["outputs"]}
    assert status == 200
    assert outputs["classes"]["shape"] == [1, 5]
    assert set(outputs["classes"]["data"]) <= set(CLASSES)


NAN = np.full((1, 3, SIZE, SIZE), np.nan, np.float32)
WRONG = {
    "shape": ("input", NAN[..., :8], "FP32", r"of shape \(N, 3x32x32\)"),
    "type": ("input", np.zeros((1, 3, SIZE, SIZE), np.uint8), "UINT8", "is of type FP32, not UINT8"),
    "nan": ("input", NAN, "FP32", "hold NaN"),
    "too many": ("input", np.zeros((33, 3, SIZE, SIZE), np.float32), "FP32", "has 1 to 32 images"),
    "no image": ("image", np.array([b"GIF, no image"], object), "BYTES", "file 1 of 'image' is no image"),
    "other name": ("pixels", NAN, "FP32", "there is no input 'pixels'"),
}


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_sentence(server, kind, case):
    name, array, datatype, sentence = WRONG[case]
    with pytest.raises(Exception, match=sentence) as caught:
        server.infer(kind, name, array, datatype)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert caught.value.message().count("\n") == 0


BODIES = {
    "no JSON": (b"\xff\xd8 a JPEG", {}, 400),
    "JSON of another kind": (b'{"images": []}', {"Content-Type": "application/json"}, 400),
    "no inputs": (b"{}", {"Inference-Header-Content-Length": "2"}, 400),
    "a length that is no number": (b"{}", {"Inference-Header-Content-Length": "two"}, 400),
    "a length beyond the body": (b'{"inputs": [1]}', {"Inference-Header-Content-Length": "99"}, 400),
    "too large": (b"", {"Content-Length": str(2**40)}, 413),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_of_another_kind_is_refused(server, case):
    body, headers, expected = BODIES[case]
    headers = {"Content-Type": "application/octet-stream"} | headers
    status, text = ask(f"{server.url}/v2/models/net/infer", body, headers)
    assert status == expected
    assert set(json.loads(text)) == {"error"}
    assert ask(f"{server.url}/v2/models/other/infer", b"{}", {"Content-Type": "application/json"})[0] in (400, 404)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_no_client_takes_the_model_away(server, kind):
    _, client = server.client(kind)
    with contextlib.closing(client):
        with pytest.raises(Exception, match="keeps the model"):
            client.unload_model("net")
        assert client.is_model_ready("net")


def test_health_metadata_and_metrics(server):
    for kind in ("http", "grpc"):
        _, client = server.client(kind)
        with contextlib.closing(client):
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("net")
    inputs = json.loads(ask(f"{server.url}/v2/models/net")[1])["inputs"]
    assert inputs[1] == {"name": "input", "datatype": "FP32", "shape": [-1, 3, SIZE, SIZE]}
    text = ask(f"{server.url}/metrics")[1]
    assert "effnet_quant_batch_images_bucket" in text
    assert "request_predict_seconds" in text


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_port_in_use_is_one_sentence(server, deployed, flag):
    taken = server.http if flag == "--http-port" else server.grpc
    with pytest.raises(UserError, match=f"^port {taken} can't be used .*{flag}.$"):
        command.job([str(deployed), flag, str(taken)])


@pytest.mark.slow
def test_sigterm_answers_what_has_come_in(start_process, deployed):
    server = Server(start_process, deployed, "--queue-delay", "1500000")  # so that requests wait while the signal comes
    files = np.array(jpegs(1), object)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.infer, kind, "image", files, "BYTES") for kind in ["http", "grpc"] * 4]
        time.sleep(0.7)
        server.process.send_signal(signal.SIGTERM)
        for request in waiting:
            assert request.result()[1].shape == (1, 5)
    _, err = server.process.communicate(timeout=40)
    assert server.process.returncode == 0, err


@pytest.mark.slow
def test_thirty_seconds_of_load_lose_nothing(run_process, repository):
    result = run_process("benchmarks/serving.py", "--seconds", 30, cwd=repository)
    print(result.out)
    assert result.code == 0, result.out + result.err
