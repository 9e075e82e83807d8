"""Starting, scaling and stopping, and what a person reads when that fails."""

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from scripts.cluster import free_ports
from scripts.server import Running, find_running, model_status, start
from scripts.terminal import UserError

TIMEOUT = 60


def test_a_port_in_use_is_named_with_the_variable_to_change(archive: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"Port {port} \(management\).*MANAGEMENT_PORT="):
            start(archive, replace(free_ports(), management=port), run_dir=tmp_path)
    assert find_running(tmp_path) is None


def cut(content: bytes) -> bytes:
    return content[:1000]


def weights_of_another_model(_: bytes) -> bytes:
    array = io.BytesIO()
    np.save(array, np.zeros((1000, 8), np.float32))
    return array.getvalue()


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("model.onnx", cut, r"model\.onnx"),
        ("classifier.npy", weights_of_another_model, r"the model gives features of shape"),
    ],
)
def test_an_archive_that_cannot_be_loaded_stops_the_start_with_the_reason(
    archive: Path, tmp_path: Path, part: str, change: Callable[[bytes], bytes], reason: str
) -> None:
    broken = tmp_path / "store" / archive.name
    broken.parent.mkdir()
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(broken, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, change(content) if name == part else content)
    with pytest.raises(UserError, match=f"cannot be loaded: {reason}"):
        start(broken, free_ports(), workers=1, run_dir=tmp_path / "run")
    assert find_running(tmp_path / "run") is None
    assert not _servers_of(tmp_path)


def test_a_wrong_java_home_is_named(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"JAVA_HOME=.* holds no bin/java"):
        start(archive, free_ports(), run_dir=tmp_path)


def test_ctrl_c_while_starting_leaves_nothing_behind(archive: Path, tmp_path: Path) -> None:
    ports = free_ports()
    program = (
        # A terminal's program takes Ctrl-C; one in a script's background is started to ignore it.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from scripts.server import Ports, start\n"
        "from scripts.terminal import command\n"
        f"command(lambda: start(Path({str(archive)!r}), {ports!r}, 1, Path({str(tmp_path)!r})))"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "server.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    assert not _servers_of(tmp_path)
    assert find_running(tmp_path) is None
    assert list(temporary.iterdir()) == []


def test_a_killed_server_is_noticed_and_cleaned_up(archive: Path, tmp_path: Path) -> None:
    server = start(archive, free_ports(), workers=1, run_dir=tmp_path)
    process = server.process()
    assert process is not None
    workers = process.children(recursive=True)
    process.kill()
    psutil.wait_procs([process, *workers], timeout=TIMEOUT)
    assert find_running(tmp_path) is None
    assert not Path(server.temporary).exists()


def test_the_server_listens_on_loopback_only(running: Running) -> None:
    process = running.process()
    assert process is not None
    listening = {
        connection.laddr[0].removeprefix("::ffff:")
        for member in (process, *process.children(recursive=True))
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_nobody_can_register_a_model(running: Running, archive: Path) -> None:
    models = running.model_url.rsplit("/", 1)[0]
    answer = requests.post(models, params={"url": archive.name}, timeout=TIMEOUT)
    assert answer.status_code in {403, 405}
    removal = requests.delete(running.model_url, timeout=TIMEOUT)
    assert removal.status_code in {403, 405}
    assert model_status(running)["modelName"] == "densenet121"


def _servers_of(folder: Path) -> list[psutil.Process]:
    """Java processes that were started with a file below this folder."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "java" and str(folder) in " ".join(process.info["cmdline"] or [])
    ]


def test_temporary_files_are_in_a_folder_of_the_servers_own(running: Running) -> None:
    folder = Path(running.temporary)
    assert folder.parent == Path(tempfile.gettempdir())
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.glob("models/*/*")) != []


def test_onnx_runtime_reports_nothing_to_its_maker(running: Running) -> None:
    """Its reporting leaves a session file in the temporary folder as soon as it is imported."""
    names = {path.name for path in Path(running.temporary).iterdir()}
    assert ".model_server.pid" in names
    assert ".ses" not in names
