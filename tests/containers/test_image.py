"""The image as it is built and as it runs: fenced in, asked, limited, flooded, and told to end."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.containerized import FENCED, READY_TIMEOUT, Container, container, in_hand, status_on
from benchmarks.known import CAT_LABELS
from benchmarks.pictures import costly
from scripts.container.engine import Engine
from scripts.container.image import build_image
from scripts.samples import CAT
from scripts.serve.management import poll

PREDICT = "/predictions/densenet121"
# Requests in hand when the container is told to end, and seconds from the last answer to the end.
IN_HAND = 16
MOST_SECONDS = 10.0
UPLOAD_BYTES = 19_000_000


def test_the_image_says_what_it_is(engine: Engine, image: str) -> None:
    found = engine.inspect("image", image)
    config = found["Config"]
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in config["Labels"].items()
        if name.startswith("org.opencontainers.image.")
    }
    assert labels["title"] == "densenet-torchserve"
    assert labels["licenses"] == "MIT"
    assert len(labels["revision"]) == 40 or labels["revision"] == "unknown"
    assert not labels["created"].startswith("1970")
    assert config["User"] == "10001:10001"
    # docker and podman keep it in different places.
    health = found.get("HealthCheck") or config.get("Healthcheck") or found["Healthcheck"]
    assert health["Test"][0] == "CMD"


def test_nothing_of_the_machine_that_built_it_is_in_it(engine: Engine, image: str) -> None:
    history = engine.run("history", "--no-trunc", image).stdout
    variables = engine.inspect("image", image)["Config"]["Env"]
    assert not [text for text in (history, *variables) if "PIP_" in text or "index-url" in text]
    look = "ls -d /etc/pip.conf /run/ca.crt ~root/.config/pip ~root/.cache 2>/dev/null; true"
    found = engine.run("run", "--rm", "--entrypoint=sh", "--user=0", image, "-c", look).stdout
    # podman leaves an empty file where a secret was.
    for path in found.split():
        size = f"wc -c < {path}"
        text = engine.run("run", "--rm", "--entrypoint=sh", "--user=0", image, "-c", size).stdout
        assert int(text) == 0, path


def test_the_image_lists_its_packages(engine: Engine, image: str) -> None:
    shown = engine.run("run", "--rm", "--entrypoint=cat", image, "/opt/densenet/sbom.json").stdout
    listed = {part["name"]: part["version"] for part in json.loads(shown)["components"]}
    freeze = ("/opt/venv/bin/pip", "list", "--format=json", "--disable-pip-version-check")
    shown = engine.run("run", "--rm", f"--entrypoint={freeze[0]}", image, *freeze[1:]).stdout
    installed = {package["name"]: package["version"] for package in json.loads(shown)}
    assert len(installed) > 10
    assert listed.items() >= installed.items()


def test_a_fenced_container_answers(served: Container) -> None:
    answer = served.ask(PREDICT, CAT.read_bytes())
    assert answer.status == 200
    assert len(answer.json()["predictions"]) == 5
    assert served.execute("id", "-u").strip() == "10001"
    with pytest.raises(Exception, match=r"[Rr]ead-only file system"):
        served.execute("touch", "/opt/densenet/file")
    assert served.ask("/metrics", port=8082).status == 200
    assert served.ask("/live").status == 200


def test_the_image_of_the_packaged_model_answers_rightly_and_carries_its_license(
    engine: Engine, base: str, lite0_archive: Path
) -> None:
    tag = f"localhost/densenet-test:{uuid4().hex[:12]}"
    build_image(engine, [lite0_archive], tag, base)
    with container(engine, tag) as running:
        answer = running.ask("/predictions/efficientnet_lite0", CAT.read_bytes())
        assert answer.json()["class_name"] in CAT_LABELS
        notice = "/opt/densenet/model_store/efficientnet_lite0-WEIGHTS-NOTICE.txt"
        assert "Apache" in running.execute("cat", notice)
    engine.tried("image", "rm", "--force", tag)


def test_nobody_outside_reaches_the_management_api(served: Container) -> None:
    listening = served.execute("cat", "/proc/net/tcp", "/proc/net/tcp6")
    sockets = [line.split() for line in listening.splitlines() if line.split()[3:4] == ["0A"]]
    open_to_all = {
        int(s[1].rsplit(":")[-1], 16) for s in sockets if set(s[1].split(":")[0]) <= {"0"}
    }
    assert open_to_all == {8080, 8082}


def test_what_torchserve_answers_wrongly_nginx_mends(served: Container) -> None:
    as_curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert served.ask(PREDICT, CAT.read_bytes(), as_curl).status == 200
    too_large = served.ask(PREDICT, bytes(21 << 20))
    assert (too_large.status, too_large.json()["type"]) == (413, "TooLarge")


def test_orphans_are_reaped(served: Container) -> None:
    pid = served.execute("sh", "-c", "sleep 0.1 >/dev/null 2>&1 & echo $!").strip()

    def gone() -> bool:
        return (
            served.engine.tried("exec", served.name, "test", "-e", f"/proc/{pid}").returncode == 1
        )

    assert poll(gone, 30), served.execute("cat", f"/proc/{pid}/stat")


def test_the_programs_probe_says_what_ping_says(served: Container) -> None:
    probe = ("exec", served.name, "python", "-m", "deploy.container.ready")
    assert served.engine.tried(*probe).returncode == 0


def test_told_to_end_it_answers_what_is_in_hand_and_ends(
    engine: Engine, image: str, note: list[str]
) -> None:
    body = CAT.read_bytes()
    with (
        container(engine, image) as running,
        in_hand(running, PREDICT, body, IN_HAND) as connections,
    ):
        # Some are with TorchServe by then, of some nginx has no more than the head.
        for connection in connections[: IN_HAND // 2]:
            connection.sendall(body)
        running.signal("TERM")
        assert poll(lambda: not running.ready(), 30)
        for connection in connections[IN_HAND // 2 :]:
            connection.sendall(body)
        statuses = Counter(status_on(connection) for connection in connections)
        answered = time.monotonic()
        assert poll(lambda: not running.runs(), 60)
        seconds = time.monotonic() - answered
        note.append(
            f"container told to end: {dict(statuses)}, ended {seconds:.1f} s after the last"
        )
        assert statuses == {200: IN_HAND}
        assert running.state()["ExitCode"] in {0, 143}
        assert seconds < MOST_SECONDS


def test_it_ends_while_it_starts(engine: Engine, image: str) -> None:
    with container(engine, image, until=None) as starting:
        assert poll(lambda: "worker(s) each" in starting.logs(), READY_TIMEOUT)
        starting.signal("TERM")
        assert poll(lambda: not starting.runs(), 60)
        assert starting.state()["ExitCode"] in {0, 143}


LITTLE = ("--cpus=1", "--memory=2g", "--memory-swap=2g")


def test_a_small_container_stands_a_flood_and_ends_with_its_frontend(
    engine: Engine, image: str, note: list[str]
) -> None:
    with container(engine, image, options=(*FENCED, *LITTLE)) as small:
        assert "1 worker(s) each, 1 to 1 threads" in small.logs()
        picture = CAT.read_bytes()
        uploads = [picture + bytes(UPLOAD_BYTES - len(picture))] * 60
        bodies = [*uploads, *costly()]
        with ThreadPoolExecutor(len(bodies)) as pool:
            asked = [pool.submit(_status, small, body) for body in bodies]
            statuses = Counter(future.result() for future in asked)
        assert set(statuses) <= {200, 413, 503}, statuses
        assert statuses[200]
        assert small.runs()
        assert not small.state()["OOMKilled"]
        assert small.ask(PREDICT, picture).status == 200
        note.append(
            f"container of 2 GiB: {len(bodies)} large uploads and costly pictures: "
            f"{dict(statuses)}, {small.peak_bytes() / 1e9:.2f} GB at most"
        )
        small.execute("sh", "-c", "kill -9 $(cat /tmp/densenet/.model_server.pid)")
        assert poll(lambda: not small.runs(), 60)
        assert small.state()["ExitCode"] == 1
        assert "TorchServe ended by itself" in small.logs()


def _status(running: Container, body: bytes) -> int | str:
    try:
        return running.ask(PREDICT, body, timeout=200).status
    except OSError as error:
        return repr(error)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--memory=1g", "memory, 1.07 GB, does not hold 1 worker(s)"),
        ("--env=WORKERS=64", "does not hold 64 worker(s)"),
        ("--env=PORT=http", "PORT must be a whole number from 1 to 65535, got 'http'"),
    ],
)
def test_limits_that_cannot_hold_it_are_refused_with_a_sentence(
    engine: Engine, image: str, option: str, sentence: str
) -> None:
    options = (*FENCED, "--memory=2g", option) if "memory" not in option else (*FENCED, option)
    with container(engine, image, options=options, until=None) as refused:
        assert poll(lambda: not refused.runs(), 60)
        assert refused.state()["ExitCode"] == 1
        assert sentence in refused.logs()
        assert "Traceback" not in refused.logs()
