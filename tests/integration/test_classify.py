"""The client and `make classify` with a real server; the rest is in unit/test_classify.py."""

import io
import json
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from requests.adapters import HTTPAdapter

from classification_client import Classification, Client, Row, classify_all
from scripts.serve.running import ServerState, find_running, free_ports
from scripts.serve.server import start, stop

COUNT = 300


def image(number: int) -> bytes:
    """Return a small JPEG, a different one for each number."""
    colors = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(colors).resize((96, 96)).save(encoded, "JPEG")
    return encoded.getvalue()


@pytest.mark.usefixtures("running")
def test_make_classify_accepts_any_file_name(run_dir: Path, tmp_path: Path) -> None:
    """In a folder that looks like a clone of the project whose server runs."""
    make = shutil.which("make")
    assert make is not None
    for name in ("Makefile", "scripts", "handler", "client", ".venv", "config.properties"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    (tmp_path / ".run").symlink_to(run_dir)
    strange = 'it\'s a "cat" of $(HOME) for $5.jpg'
    (tmp_path / "my holidays").mkdir()
    (tmp_path / strange).write_bytes(image(1))
    (tmp_path / "my holidays" / "x.jpg").write_bytes(image(2))
    command = [make, "-o", "setup", "classify", "OUTPUT=it's $5.jsonl"]

    def classify(*variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *variables], cwd=tmp_path, capture_output=True, check=False, text=True
        )

    for variable in (f"IMAGE={strange}", "IMAGES='my holidays' *.jpg"):
        done = classify(variable)
        assert done.returncode == 0, done.stderr
    rows = map(json.loads, (tmp_path / "it's $5.jsonl").read_text().splitlines())
    assert [row["picture"] for row in rows] == [strange, "my holidays/x.jpg"]
    other = classify("IMAGES=my holidays", "TOPK=3")
    assert "and this would be" in other.stderr
    assert "--topk 3" in other.stderr


@pytest.fixture
def own_server(archive: Path, tmp_path: Path) -> Iterator[ServerState]:
    yield start(archive, free_ports(), workers=2, run_dir=tmp_path / "run")
    now = find_running(tmp_path / "run")  # the test replaces it
    assert now is not None
    stop(now, tmp_path / "run")


def test_hundreds_of_images_survive_a_restart_of_the_server(
    archive: Path, own_server: ServerState, tmp_path: Path
) -> None:
    files = [tmp_path / f"{number:04}.jpg" for number in range(COUNT)]
    contents = {}
    for number, file in enumerate(files):
        file.write_bytes(image(number))
        contents[file.read_bytes()] = str(file)
    rows: list[Row] = []
    asked: Counter[str] = Counter()
    succeeded: Counter[str] = Counter()
    enough, lock = threading.Event(), threading.Lock()

    class Counting(HTTPAdapter):
        def send(
            self, request: requests.PreparedRequest, *arguments: Any, **options: Any
        ) -> requests.Response:
            body = request.body
            assert isinstance(body, bytes)
            name = contents[body[body.index(b"\xff\xd8") : body.rindex(b"\xff\xd9") + 2]]
            with lock:
                asked[name] += 1
            response = super().send(request, *arguments, **options)
            with lock:
                succeeded[name] += response.status_code == 200
            return response

    def take(row: Row) -> None:
        rows.append(row)
        if len(rows) == COUNT // 3:
            enough.set()

    def restart() -> None:
        enough.wait()
        stop(own_server, tmp_path / "run")
        start(archive, own_server.ports, workers=2, run_dir=tmp_path / "run")

    operator = threading.Thread(target=restart)
    operator.start()
    try:
        with Client(own_server.predictions_url) as client:
            client._session.mount("http://", Counting(pool_maxsize=16))
            classify_all(files, client, 16, take)
    finally:
        enough.set()
        operator.join()
    assert Counter(row.image for row in rows) == Counter(map(str, files))
    assert all(isinstance(row.answer, Classification) for row in rows)
    assert set(succeeded.values()) == {1}, "an image was sent again after its response"
    assert asked.total() > COUNT, "no request was in flight during the restart"
