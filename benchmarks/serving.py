"""effnet-quant serve under load: wrong answers, lost requests, memory, latency, and throughput over the engine alone.

    python benchmarks/serving.py --network efficientnet-b0 --image-size 224

Clients send tensors over gRPC, one image a request, each as fast as its answers come. They share the machine with the
server. The engine alone runs batches of as many images as there are clients, before and after. The exit status is 1 if an
answer is wrong, a request is lost, or the server's memory grows by more than a tenth after the first third of the time.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
import tritonclient.grpc as grpcclient

from effnet_quant import create_model, export_onnx, load_engine
from effnet_quant.card import InputSpec, ModelCard


def main() -> int:
    """Run the server and the clients; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar-resnet20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        torch.manual_seed(0)
        card = ModelCard(num_classes=10, input=InputSpec(parsed.image_size, parsed.image_size))
        export_onnx(create_model(parsed.network, num_classes=10).eval(), path, parsed.image_size, card=card)
        return _measure(path, parsed.clients, parsed.seconds)


def _measure(path: Path, clients: int, seconds: float) -> int:
    engine = load_engine(path)
    (images,) = engine.example_inputs(clients)
    expected = torch.from_numpy(np.concatenate([engine(image[None]) for image in images])).softmax(1).numpy()
    alone = _alone(engine, images)
    http, grpc = _free_port(), _free_port()
    command = [sys.executable, "-m", "effnet_quant", "serve", str(path), "--http-port", str(http)]
    with subprocess.Popen([*command, "--grpc-port", str(grpc)]) as server:
        try:
            _wait(server, http)
            times, wrong, lost, memory = _load(server.pid, grpc, images, expected, seconds)
        finally:
            server.send_signal(signal.SIGTERM)
    alone_after = _alone(engine, images)
    served = len(times) / seconds
    growth = max(memory[len(memory) // 3 :]) / memory[len(memory) // 3]
    p50, p99 = np.percentile(times, [50, 99]) * 1000 if times else (np.nan, np.nan)
    load = os.getloadavg()[0]
    print(f"{len(times)} answers to {clients} clients, {wrong} wrong, {lost} lost; load of the machine {load:.1f}")
    print(f"{p50:.1f} ms (50 %), {p99:.1f} ms (99 %); server's memory {memory[0]:.0f} to {memory[-1]:.0f} MiB")
    ratio = served / np.mean([alone, alone_after])
    print(f"{served:.0f} images/s; the engine alone {alone:.0f} before, {alone_after:.0f} after: {ratio:.2f}x")
    return int(bool(wrong or lost or not times or growth > 1.1 or server.returncode))


def _alone(engine, images) -> float:
    engine.warm_up(len(images))
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 5:
        engine(images)
        count += len(images)
    return count / (time.perf_counter() - start)


def _load(pid, port, images, expected, seconds):
    times, mistakes, memory = [], {"wrong": 0, "lost": 0}, []
    lock, end = threading.Lock(), time.perf_counter() + seconds

    def ask(number: int) -> None:
        client = grpcclient.InferenceServerClient(f"127.0.0.1:{port}")
        given = grpcclient.InferInput("input", [1, *images.shape[1:]], "FP32")
        given.set_data_from_numpy(images[number : number + 1])
        chances = np.sort(expected[number])[::-1][:5]
        while time.perf_counter() < end:
            start = time.perf_counter()
            try:
                answer = client.infer("net", [given], client_timeout=20)
            except Exception as error:  # whatever happens, the request is lost
                print(error, file=sys.stderr)
                with lock:
                    mistakes["lost"] += 1
                continue
            took = time.perf_counter() - start
            top = answer.as_numpy("classes")[0, 0].decode() == f"class {expected[number].argmax()}"
            with lock:
                times.append(took)
                mistakes["wrong"] += not (top and np.allclose(answer.as_numpy("probabilities")[0], chances, atol=1e-4))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(_resident(pid))
        time.sleep(1)
    return times, mistakes["wrong"], mistakes["lost"], memory


def _resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _wait(server, port) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready"):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
