"""The image as built and as run: without privileges, with little memory, overloaded, stopped."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.containerized import (
    FENCED,
    READY_TIMEOUT,
    Container,
    container,
    in_flight,
    status_on,
)
from benchmarks.images import costly, encode, photograph
from benchmarks.known import CAT_LABELS
from scripts.container.engine import Engine
from scripts.samples import CAT
from scripts.serve.management import wait_until
from scripts.store import PACKAGED_ARCHITECTURE, WEIGHTS_NOTICE

PREDICT = f"/predictions/{PACKAGED_ARCHITECTURE}"
# Requests in flight when the container receives SIGTERM.
IN_FLIGHT = 16
UPLOAD_BYTES = 19_000_000


def test_the_image_has_labels_and_no_settings_of_the_build_machine(
    engine: Engine, image: str
) -> None:
    config = engine.inspect("image", image)["Config"]
    prefix = "org.opencontainers.image."
    labels = {name.removeprefix(prefix): value for name, value in config["Labels"].items()}
    assert (labels["title"], labels["licenses"]) == ("densenet-torchserve", "MIT")
    assert len(labels["revision"]) == 40 or labels["revision"] == "unknown"
    assert not labels["created"].startswith("1970")
    history = engine.run("history", "--no-trunc", image).stdout
    assert not [text for text in (history, *config["Env"]) if "PIP_" in text or "index-url" in text]
    # podman leaves an empty file in place of a secret.
    places = "/etc/pip.conf /run/ca.crt ~root/.config/pip ~root/.cache"
    look = f"find {places} -type f -size +0 2>/dev/null; true"
    shell = ("--entrypoint=sh", "--user=0", image, "-c", look)
    assert not engine.run("run", "--rm", *shell).stdout


def test_the_image_contains_a_list_of_its_packages_and_the_license_of_its_weights(
    served: Container,
) -> None:
    bill = json.loads(served.execute("cat", "/opt/densenet/sbom.json"))
    listed = {part["name"]: part["version"] for part in bill["components"]}
    freeze = ("/opt/venv/bin/pip", "list", "--format=json", "--disable-pip-version-check")
    packages = json.loads(served.execute(*freeze))
    assert len(packages) > 10
    assert listed.items() >= {package["name"]: package["version"] for package in packages}.items()
    notice = f"/opt/densenet/model_store/{PACKAGED_ARCHITECTURE}-{WEIGHTS_NOTICE}"
    assert "Apache" in served.execute("cat", notice)


def test_a_container_without_privileges_classifies(
    engine: Engine, image: str, served: Container
) -> None:
    answer = served.ask(PREDICT, CAT.read_bytes())
    assert answer.status == 200
    assert answer.json()["class_name"] in CAT_LABELS
    assert served.execute("id", "-u").strip() == "10001"
    with pytest.raises(Exception, match=r"[Rr]ead-only file system"):
        served.execute("touch", "/opt/densenet/file")
    assert served.ask("/metrics", port=8082).status == 200
    assert served.ask("/live").status == 200
    # docker and podman store the health check in different places.
    found = engine.inspect("image", image)
    health = found.get("HealthCheck") or found["Config"].get("Healthcheck") or found["Healthcheck"]
    kind, *command = health["Test"]
    assert kind == "CMD"
    served.execute(*command)


def test_the_management_api_and_grpc_are_unreachable_from_outside(served: Container) -> None:
    listening = served.execute("cat", "/proc/net/tcp", "/proc/net/tcp6")
    sockets = [line.split() for line in listening.splitlines() if line.split()[3:4] == ["0A"]]
    addresses = [socket[1].rsplit(":", 1) for socket in sockets]
    assert {int(port, 16) for host, port in addresses if not host.strip("0")} == {8080, 8082}


def test_a_malformed_form_is_the_clients_mistake(served: Container) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    malformed = b'--x\r\nContent-Disposition: form-data; name=""\r\n\r\nabc'
    answer = served.ask(PREDICT, malformed, form)
    assert (answer.status, answer.json()["type"]) == (400, "BadRequest")


def test_orphans_are_reaped(served: Container) -> None:
    pid = served.execute("sh", "-c", "sleep 0.1 >/dev/null 2>&1 & echo $!").strip()
    look = ("exec", served.name, "test", "-e", f"/proc/{pid}")
    assert wait_until(lambda: served.engine.run_unchecked(*look).returncode == 1, 30)


def test_a_small_container_survives_overload_and_drains_on_sigterm(
    engine: Engine, image: str
) -> None:
    little = ("--cpus=1", "--memory=2g", "--memory-swap=2g")
    body = encode(photograph(2400, 1800))
    with container(engine, image, options=(*FENCED, *little)) as small:
        assert "1 worker(s) each, 1 to 1 threads" in small.logs()
        bodies = [*[body + bytes(UPLOAD_BYTES - len(body))] * 60, *costly()]
        with ThreadPoolExecutor(len(bodies)) as pool:
            statuses = Counter(pool.map(lambda one: _status(small, one), bodies))
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
