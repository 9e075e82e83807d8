"""`make run` with weights to download; without them it is tested with the README."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests

from scripts.build.sources.torchvision import TorchvisionSource
from scripts.samples import CAT
from scripts.serve.running import RUN_DIR, free_ports, unused_ports
from tests.published import publish
from tests.workspace import copy_project


def test_only_densenet_is_served_if_its_weights_can_be_downloaded(
    densenet: TorchvisionSource, tmp_path: Path
) -> None:
    host, clone, ports = tmp_path / "host", tmp_path / "clone", free_ports()
    (management,) = unused_ports(1)
    host.mkdir()
    clone.mkdir()
    file = publish(densenet, host)
    copy_project(clone)
    serve = partial(SimpleHTTPRequestHandler, directory=str(host))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever).start()
        variables = {
            "DENSENET_WEIGHTS": f"http://127.0.0.1:{server.server_port}/{file.name}",
            "DENSENET_PORT": str(ports.inference),
            "DENSENET_MANAGEMENT_PORT": str(management),
            "DENSENET_METRICS_PORT": str(ports.metrics),
            "TORCH_HOME": str(clone / "torch"),
        }
        try:
            printed = subprocess.check_output(
                [sys.executable, "-m", "scripts", "run"],
                cwd=clone,
                env=os.environ | variables,
                text=True,
                timeout=280,
            )
            served = json.loads((clone / RUN_DIR / "server.json").read_text())["models"]
            url = f"http://127.0.0.1:{ports.inference}/predictions/densenet121"
            answer = requests.post(url, files={"file": CAT.read_bytes()}, timeout=60)
            models = requests.get(f"http://127.0.0.1:{management}/models", timeout=60).json()
        finally:
            server.shutdown()
            subprocess.run(["make", "stop"], cwd=clone, check=True, capture_output=True)
    assert list(served) == ["densenet121"]
    assert [model["modelName"] for model in models["models"]] == ["densenet121"]
    assert "efficientnet_lite0" not in printed
    assert "Packages:" not in printed
    assert answer.headers["x-model-weights"] == "trained"
    assert "warning" not in answer.json()
