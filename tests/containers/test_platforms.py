"""The image as SageMaker and Vertex AI run it."""

import base64
import json
import zipfile
from contextlib import suppress
from pathlib import Path

from scripts.container.engine import Engine
from scripts.samples import CAT
from scripts.serve.management import wait_until
from tests.containers.running import (
    OTHER,
    READY_TIMEOUT,
    Answer,
    Container,
    container,
    other_archive,
    readable,
)

JSON = {"Content-Type": "application/json"}
# Of SageMaker and of KServe.
HEALTH = ("/ping", "/v2/health/ready", "/v1/models/densenet121", "/v2/models/densenet121/ready")


def test_sagemakers_container_is_healthy_only_while_a_worker_is_ready(
    engine: Engine, image: str, archive: Path, tmp_path: Path
) -> None:
    """As on SageMaker: `serve`, root, a writable root, `model.tar.gz` unpacked."""
    folder = tmp_path / "model"
    with zipfile.ZipFile(other_archive(archive, tmp_path / "pets.mar")) as content:
        content.extractall(folder)
    options = ("--user=0:0", f"--volume={readable(folder)}:/opt/ml/model")
    with container(engine, image, "serve", options=options, until=None) as running:
        seen = set()

        def ready() -> bool:
            seen.add(running.status("/ping"))
            return 200 in seen

        assert wait_until(ready, READY_TIMEOUT), running.logs()
        # nginx responds before a worker is ready; None while its port is closed.
        assert seen - {None} == {503, 200}
        assert all(running.status(path) == 200 for path in HEALTH)
        assert running.execute("id", "-u").strip() == "0"
        _check_contract(running)

        def unhealthy_without_workers() -> bool:
            running.execute("python", "-c", _KILL_WORKERS)  # TorchServe replaces them
            return all(running.status(path) == 503 for path in HEALTH)

        assert wait_until(unhealthy_without_workers, 60), running.logs()
        running.execute("sh", "-c", "kill -9 $(cat /tmp/densenet/.model_server.pid)")
        assert wait_until(lambda: not running.runs(), 60)
        assert running.state()["ExitCode"] == 1
        assert "TorchServe exited by itself" in running.logs()


_KILL_WORKERS = """
import psutil
for process in psutil.process_iter():
    if any(part.endswith("model_service_worker.py") for part in process.cmdline()):
        process.kill()
"""


def _check_contract(running: Container) -> None:
    """Send SageMaker's requests; the mounted model must respond."""
    photo = CAT.read_bytes()
    answer = running.ask("/invocations", photo, {"Content-Type": "application/x-image"})
    assert answer.status == 200, answer.body
    assert answer.json()["predictions"][0]["label"].startswith(OTHER)
    instances = {"instances": [{"b64": base64.b64encode(photo).decode()}]}
    answer = running.ask("/invocations", json.dumps(instances).encode(), JSON)
    assert answer.json()["predictions"][0]["success"]
    rejected = running.ask("/invocations", b"no image", {"Content-Type": "image/jpeg"})
    assert (rejected.status, rejected.json()["type"]) == (400, "NotAnImage")


def test_vertex_ai_chooses_port_and_paths(engine: Engine, image: str) -> None:
    port, health = 7080, "/v1/endpoints/12/deployedModels/34"
    variables = {
        "AIP_HTTP_PORT": str(port),
        "AIP_HEALTH_ROUTE": health,
        "AIP_PREDICT_ROUTE": f"{health}:predict",
        "AIP_STORAGE_URI": "",
    }

    def healthy(running: Container) -> bool:
        with suppress(OSError):
            return running.ask(health, port=port, timeout=5).status == 200
        return False

    photo = base64.b64encode(CAT.read_bytes()).decode()
    start = container(engine, image, environment=variables, ports=(port,), until=None)
    with start as running:
        assert wait_until(lambda: healthy(running), READY_TIMEOUT), running.logs()

        def predict(instances: list[dict[str, str]]) -> Answer:
            body = {"instances": instances, "parameters": {"topk": 1}}
            return running.ask(f"{health}:predict", json.dumps(body).encode(), JSON, port=port)

        for key in ("data", "b64"):
            answer = predict([{key: photo}] * 2)
            assert answer.status == 200, answer.body
            predictions = answer.json()["predictions"]
            assert [len(one["predictions"]) for one in predictions] == [1, 1]
        rejected = predict([{"data": "bm8gaW1hZ2U="}])
        assert (rejected.status, rejected.json()["type"]) == (400, "NotAnImage")
