"""Starting and stopping the server, and the error messages if that fails."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

import scripts
from benchmarks.archives import repack
from scripts import run
from scripts.serve import commands, server
from scripts.serve.management import PIXEL, management_session, model_status
from scripts.serve.preflight import METRICS_CONFIG, try_archive
from scripts.serve.running import ServerState, find_running, free_ports
from scripts.serve.server import start
from scripts.terminal import UserError
from tests.served import post, served, worker_pids

TIMEOUT = 60


def weights_of_another_model(_: bytes) -> bytes:
    array = io.BytesIO()
    np.save(array, np.zeros((1000, 8), np.float32))
    return array.getvalue()


def that_begins_with(line: bytes) -> Callable[[bytes], bytes]:
    return lambda program: line + b"\n" + program


HANDLER = "densenet_handler.py"
# By test id: a file of the archive, a change of it, and the error message.
BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "model": ("model.onnx", lambda content: content[:1000], r"model\.onnx: cannot be loaded"),
    "classifier": ("classifier.npy", weights_of_another_model, "the model gives features of shape"),
    "module": (
        HANDLER,
        that_begins_with(b"import nothing_like_this"),
        "ModuleNotFoundError: No module named 'nothing_like_this'",
    ),
    "killed": (
        HANDLER,
        that_begins_with(b"import os; os.kill(os.getpid(), 9)"),
        "its process was killed by SIGKILL",
    ),
}


def broken_archive(archive: Path, folder: Path, kind: str) -> Path:
    """Write a copy of the archive with one broken file."""
    part, change, _ = BROKEN[kind]
    broken = folder / "store" / archive.name
    broken.parent.mkdir()
    return repack(
        archive, broken, lambda name, content: change(content) if name == part else content
    )


def test_a_failed_start_reports_the_reason_keeps_its_logs_and_leaves_no_process(
    archive: Path, tmp_path: Path
) -> None:
    broken = broken_archive(archive, tmp_path, "model")
    reason = f"cannot be loaded: {BROKEN['model'][2]}.* The worker's log is .*server/logs"
    with pytest.raises(UserError, match=reason):
        start(broken, free_ports(), 1, tmp_path / "server")
    assert (tmp_path / "server" / "logs" / "model.log").exists()
    assert find_running(tmp_path / "server") is None
    assert not _servers_of(tmp_path)


def test_a_server_starts_on_an_unusual_machine(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / r"my\new prüfung-分類"
    (folder / ("a" * 90)).mkdir(parents=True)
    shutil.copy(archive, folder)
    (folder / "old.properties").write_text("inference_address=http://127.0.0.1:9")
    for name, value in {
        "TS_CONFIG_FILE": str(folder / "old.properties"),
        "TS_MODEL_SERVER_HOME": "/nonexistent",
        "JAVA_HOME": str(folder),
        "_JAVA_OPTIONS": "-Xmx1m",
        "TMPDIR": str(folder / ("a" * 90)),
        "LC_ALL": "C",
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
        "NO_PROXY": "",
    }.items():
        monkeypatch.setenv(name, value)
    scripts._bypass_proxies_on_loopback()
    with served(folder / archive.name, folder / "run") as running:
        assert post(running, PIXEL).status_code == 200
    assert (folder / "run" / "logs" / "model.log").exists()


@pytest.mark.parametrize("kind", ["classifier", "module", "killed"])
def test_a_broken_archive_is_rejected_before_the_running_server_stops(
    kind: str, archive: Path, tmp_path: Path
) -> None:
    broken = broken_archive(archive, tmp_path, kind)
    with pytest.raises(UserError, match=f"cannot be loaded: .*{BROKEN[kind][2]}"):
        try_archive(broken)


def test_a_valid_archive_passes_the_trial(archive: Path) -> None:
    try_archive(archive)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the configuration of servers."""
    for path in (METRICS_CONFIG, Path(server.CONFIG), Path(server.LOG_CONFIG)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(path.resolve())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_running_server_is_not_stopped_if_the_new_one_cannot_start(
    running: ServerState, run_dir: Path, archive: Path, own_folder: Path
) -> None:
    (own_folder / ".run").symlink_to(run_dir)
    before = worker_pids(running)
    broken = broken_archive(archive, own_folder, "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other = replace(running.ports, metrics=taken.getsockname()[1])
        for path, ports, workers, message in (
            (broken, running.ports, None, r"model\.onnx: cannot be loaded"),
            (archive, running.ports, 999, "WORKERS=999 is more than this machine can run"),
            (archive, other, None, "METRICS_PORT="),
            (archive, replace(running.ports, inference=0), None, "PORT must be 1 to 65535"),
        ):
            with pytest.raises(UserError, match=message):
                run._serve([path], ports, workers, grpc=False)
    assert worker_pids(running) == before
    assert find_running() == running
    assert run._serve([archive], running.ports, None, grpc=False) == running


def test_ctrl_c_during_the_start_leaves_no_process_and_no_files(
    archive: Path, tmp_path: Path
) -> None:
    ports = free_ports()
    program = (
        # Shells start background programs with SIGINT ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from scripts.serve.running import Ports\n"
        "from scripts.serve.server import start\n"
        "from scripts.terminal import command\n"
        f"command(lambda: start(Path({str(archive)!r}), {ports!r}, 1, Path({str(tmp_path)!r})))"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(temporary)},
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
    assert list(temporary.glob("*/*")) == []


@pytest.mark.slow
def test_a_server_whose_run_folder_was_removed_is_found_and_a_killed_one_is_cleared(
    archive: Path, own_folder: Path
) -> None:
    """A start or stop clears what a killed server left; `find_running` does not."""
    folder = own_folder / ".run"
    running = start(archive, free_ports(), 1)
    shutil.rmtree(folder)
    found = find_running()
    assert found == running
    assert model_status(found)["workers"][0]["status"] == "READY"
    commands.scale_command(2)

    process = found.process()
    assert process is not None
    workers = process.children(recursive=True)
    process.kill()
    psutil.wait_procs([process, *workers], timeout=TIMEOUT)
    assert find_running() is None
    assert Path(running.temporary).exists()
    shutil.rmtree(running.temporary)

    folder.mkdir()
    again = start(archive, free_ports(), 1)
    shutil.rmtree(folder)
    commands.stop_command()
    assert again.process() is None
    assert not Path(again.temporary).exists()


def listening(running: ServerState) -> set[tuple[str, int]]:
    process = running.process()
    assert process is not None
    return {
        (connection.laddr[0].removeprefix("::ffff:"), connection.laddr[1])
        for member in (process, *process.children(recursive=True))
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_the_server_listens_on_loopback_only_and_its_grpc_is_unreachable(
    running: ServerState,
) -> None:
    """TorchServe always listens for gRPC; here at an address that the kernel does not route."""
    places = listening(running)
    grpc = {(host, port) for host, port in places if host == server._UNREACHABLE_ADDRESS}
    assert len(grpc) == 2
    assert {host for host, _ in places - grpc} == {"127.0.0.1"}
    assert {port for _, port in places - grpc} == set(running.ports.used(grpc=False).values())
    for host, port in grpc:
        for address in (host, "127.0.0.1", "::1"):
            with pytest.raises(OSError, match=r"unreachable|refused|assign"):
                socket.create_connection((address, port), timeout=2).close()


def test_no_port_leads_to_the_management_api_whatever_the_host_header(
    running: ServerState,
) -> None:
    """DNS rebinding: a web page's own name may resolve to this machine."""
    assert running.management_socket.parent.stat().st_mode & 0o077 == 0
    for port in running.ports.used(grpc=False).values():
        url = f"http://127.0.0.1:{port}/models/{running.model}"
        for host in ("evil.example", "localhost"):
            headers = {"Host": host}
            answer = requests.put(url, params={"min_worker": 0}, headers=headers, timeout=TIMEOUT)
            assert answer.status_code >= 400, url
    assert model_status(running)["minWorkers"] > 0


def test_models_cannot_be_registered_or_removed(running: ServerState, archive: Path) -> None:
    management, models = management_session(), running.model_url.rsplit("/", 1)[0]
    for answer in (
        management.post(models, params={"url": archive.name}, timeout=TIMEOUT),
        management.delete(running.model_url, timeout=TIMEOUT),
    ):
        assert answer.status_code in {403, 405}
    assert model_status(running)["modelName"] == "densenet121"


def _servers_of(folder: Path) -> list[psutil.Process]:
    """Return the Java processes that were started with a file below this folder."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "java" and str(folder) in " ".join(process.info["cmdline"] or [])
    ]


def test_temporary_files_are_private_and_onnx_runtime_sends_no_telemetry(
    running: ServerState,
) -> None:
    """Its telemetry would write a session file to the temporary folder on import."""
    folder = Path(running.temporary)
    assert folder.parent.name == "densenet"
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.glob("models/*/*")) != []
    names = {path.name for path in folder.iterdir()}
    assert ".model_server.pid" in names
    assert ".ses" not in names
