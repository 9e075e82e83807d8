"""The image as built and as run: without privileges, with little memory, overloaded, stopped."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.containerized import (
    FENCED,
    READY_TIMEOUT,
    Container,
    container,
    in_flight,
    status_on,
)
from benchmarks.images import costly
from benchmarks.known import CAT_LABELS
from scripts.container.engine import Engine
from scripts.container.image import build_image
from scripts.samples import CAT
from scripts.serve.management import wait_until

PREDICT = "/predictions/densenet121"
# Requests in flight when the container receives SIGTERM.
IN_FLIGHT = 16
UPLOAD_BYTES = 19_000_000


def test_the_image_has_labels_a_user_and_a_health_check(engine: Engine, image: str) -> None:
    found = engine.inspect("image", image)
    config = found["Config"]
    prefix = "org.opencontainers.image."
    labels = {name.removeprefix(prefix): value for name, value in config["Labels"].items()}
    assert (labels["title"], labels["licenses"]) == ("densenet-torchserve", "MIT")
    assert len(labels["revision"]) == 40 or labels["revision"] == "unknown"
    assert not labels["created"].startswith("1970")
    assert config["User"] == "10001:10001"
    # docker and podman store it in different places.
    health = found.get("HealthCheck") or config.get("Healthcheck") or found["Healthcheck"]
    assert health["Test"][0] == "CMD"


def test_the_image_contains_no_settings_of_the_build_machine(engine: Engine, image: str) -> None:
    history = engine.run("history", "--no-trunc", image).stdout
    variables = engine.inspect("image", image)["Config"]["Env"]
    assert not [text for text in (history, *variables) if "PIP_" in text or "index-url" in text]
    # podman leaves an empty file in place of a secret.
    places = "/etc/pip.conf /run/ca.crt ~root/.config/pip ~root/.cache"
    look = f"find {places} -type f -size +0 2>/dev/null; true"
    shell = ("--entrypoint=sh", "--user=0", image, "-c", look)
    assert not engine.run("run", "--rm", *shell).stdout


def test_the_image_lists_its_packages(served: Container) -> None:
    bill = json.loads(served.execute("cat", "/opt/densenet/sbom.json"))
    listed = {part["name"]: part["version"] for part in bill["components"]}
    freeze = ("/opt/venv/bin/pip", "list", "--format=json", "--disable-pip-version-check")
    packages = json.loads(served.execute(*freeze))
    assert len(packages) > 10
    assert listed.items() >= {package["name"]: package["version"] for package in packages}.items()


def test_a_container_without_privileges_classifies(served: Container) -> None:
    answer = served.ask(PREDICT, CAT.read_bytes())
    assert answer.status == 200
    assert len(answer.json()["predictions"]) == 5
    assert served.execute("id", "-u").strip() == "10001"
    with pytest.raises(Exception, match=r"[Rr]ead-only file system"):
        served.execute("touch", "/opt/densenet/file")
    assert served.ask("/metrics", port=8082).status == 200
    assert served.ask("/live").status == 200
    served.execute("python", "-m", "deploy.container.ready")


def test_the_image_of_the_packaged_model_classifies_and_has_its_license(
    engine: Engine, base: str, lite0_archive: Path
) -> None:
    tag = f"localhost/densenet-test:{uuid4().hex[:12]}"
    build_image(engine, [lite0_archive], tag, base)
    with container(engine, tag) as running:
        answer = running.ask("/predictions/efficientnet_lite0", CAT.read_bytes())
        assert answer.json()["class_name"] in CAT_LABELS
        notice = "/opt/densenet/model_store/efficientnet_lite0-WEIGHTS-NOTICE.txt"
        assert "Apache" in running.execute("cat", notice)
    engine.run_unchecked("image", "rm", "--force", tag)


def test_the_management_api_and_grpc_are_unreachable_from_outside(served: Container) -> None:
    listening = served.execute("cat", "/proc/net/tcp", "/proc/net/tcp6")
    sockets = [line.split() for line in listening.splitlines() if line.split()[3:4] == ["0A"]]
    addresses = [socket[1].rsplit(":", 1) for socket in sockets]
    assert {int(port, 16) for host, port in addresses if not host.strip("0")} == {8080, 8082}


def test_nginx_corrects_torchserves_responses(served: Container) -> None:
    as_curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert served.ask(PREDICT, CAT.read_bytes(), as_curl).status == 200
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    malformed = served.ask(
        PREDICT, b'--x\r\nContent-Disposition: form-data; name=""\r\n\r\nabc', form
    )
    assert (malformed.status, malformed.json()["type"]) == (400, "BadRequest")
    too_large = served.ask(PREDICT, bytes(21 << 20))
    assert (too_large.status, too_large.json()["type"]) == (413, "TooLarge")


def test_orphans_are_reaped(served: Container) -> None:
    pid = served.execute("sh", "-c", "sleep 0.1 >/dev/null 2>&1 & echo $!").strip()
    look = ("exec", served.name, "test", "-e", f"/proc/{pid}")
    assert wait_until(lambda: served.engine.run_unchecked(*look).returncode == 1, 30)


def test_a_small_container_survives_overload_and_drains_on_sigterm(
    engine: Engine, image: str
) -> None:
    little = ("--cpus=1", "--memory=2g", "--memory-swap=2g")
    body = CAT.read_bytes()
    with container(engine, image, options=(*FENCED, *little)) as small:
        assert "1 worker(s) each, 1 to 1 threads" in small.logs()
        bodies = [*[body + bytes(UPLOAD_BYTES - len(body))] * 60, *costly()]
        with ThreadPoolExecutor(len(bodies)) as pool:
            asked = [pool.submit(_status, small, body) for body in bodies]
            statuses = Counter(future.result() for future in asked)
        assert set(statuses) <= {200, 413, 503}, statuses
        assert statuses[200]
        assert small.runs()
        assert not small.state()["OOMKilled"]

        with in_flight(small, PREDICT, body, IN_FLIGHT) as connections:
            # TorchServe has some requests; of the others nginx has only the head.
            for connection in connections[: IN_FLIGHT // 2]:
                connection.sendall(body)
            small.signal("TERM")
            assert wait_until(lambda: not small.ready(), 30)
            for connection in connections[IN_FLIGHT // 2 :]:
                connection.sendall(body)
            assert [status_on(connection) for connection in connections] == [200] * IN_FLIGHT
        assert wait_until(lambda: not small.runs(), 60)
        assert small.state()["ExitCode"] in {0, 143}


def _status(running: Container, body: bytes) -> int | str:
    try:
        return running.ask(PREDICT, body, timeout=200).status
    except OSError as error:
        return repr(error)


def test_it_stops_during_its_start(engine: Engine, image: str) -> None:
    with container(engine, image, until=None) as starting:
        assert wait_until(lambda: "worker(s) each" in starting.logs(), READY_TIMEOUT)
        starting.signal("TERM")
        assert wait_until(lambda: not starting.runs(), 60)
        assert starting.state()["ExitCode"] in {0, 143}
