"""The image as SageMaker runs it: with the argument `serve`, and its model in /opt/ml/model."""

import base64
import json
import zipfile
from pathlib import Path

from scripts.container.engine import Engine
from scripts.samples import sample_photographs
from scripts.serve.management import poll
from tests.containers.mounts import OTHER, other_archive, readable
from tests.containers.running import FENCED, READY_TIMEOUT, Container, container

MOUNT = "/opt/ml/model"
# SageMaker's, and KServe's, which are there too.
HEALTH = ("/ping", "/v2/health/ready", "/v1/models/pets", "/v2/models/pets/ready")


def _check_contract(running: Container) -> None:
    """Asks as SageMaker does; the mounted model answers."""
    photo = next(iter(sample_photographs()))
    encoded = base64.b64encode(photo).decode()
    bodies = [
        *((kind, photo) for kind in ("image/jpeg", "application/x-image")),
        *((kind, photo) for kind in ("application/octet-stream", "")),
        ("application/json", json.dumps({"image": encoded}).encode()),
    ]
    for kind, body in bodies:
        answer = running.ask("/invocations", body, {"Content-Type": kind})
        assert answer.status == 200, (kind, answer.body)
        assert answer.json()["predictions"][0]["label"].startswith(OTHER), kind
    instances = json.dumps({"instances": [{"b64": encoded}]}).encode()
    answer = running.ask("/invocations", instances, {"Content-Type": "application/json"})
    assert answer.json()["predictions"][0]["success"]
    refused = running.ask("/invocations", b"no picture", {"Content-Type": "image/jpeg"})
    assert (refused.status, refused.json()["type"]) == (400, "NotAnImage")


def test_ping_is_true_only_when_a_worker_is_ready(
    engine: Engine, image: str, archive: Path, tmp_path: Path
) -> None:
    """An archive, as the image's own user, on a file system that is read-only."""
    other_archive(archive, tmp_path / "pets.mar")
    options = (*FENCED, f"--volume={readable(tmp_path)}:{MOUNT}:ro")
    with container(engine, image, "serve", options=options, until=None) as running:
        seen = set()

        def ready() -> bool:
            status = running.status("/ping")
            # Before that its port may not be open yet.
            seen.add(status)
            return status == 200

        assert poll(ready, READY_TIMEOUT), running.logs()
        # nginx answers long before a worker can.
        assert seen - {None} == {503, 200}
        assert all(running.status(path) == 200 for path in HEALTH)
        _check_contract(running)

        def unhealthy_without_workers() -> bool:
            running.execute("python", "-c", _END_WORKERS)  # TorchServe starts others at once
            return all(running.status(path) == 503 for path in HEALTH)

        assert poll(unhealthy_without_workers, 60), running.logs()


_END_WORKERS = """
import psutil
for process in psutil.process_iter():
    if any(part.endswith("model_service_worker.py") for part in process.cmdline()):
        process.kill()
"""


def test_the_content_of_an_archive_as_root(
    engine: Engine, image: str, archive: Path, tmp_path: Path
) -> None:
    """As SageMaker does: root, nothing read-only, `model.tar.gz` unpacked."""
    packed = other_archive(archive, tmp_path / "pets.mar")
    folder = tmp_path / "model"
    with zipfile.ZipFile(packed) as content:
        content.extractall(folder)
    options = ("--user=0:0", f"--volume={readable(folder)}:{MOUNT}")
    with container(engine, image, "serve", options=options) as running:
        _check_contract(running)
        assert running.execute("id", "-u").strip() == "0"
