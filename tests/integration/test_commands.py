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
from scripts.serve.server import start, stop
from scripts.terminal import UserError

TIMEOUT = 60


def cut(content: bytes) -> bytes:
    return content[:1000]


def weights_of_another_model(_: bytes) -> bytes:
    array = io.BytesIO()
    np.save(array, np.zeros((1000, 8), np.float32))
    return array.getvalue()


def that_begins_with(line: str) -> Callable[[bytes], bytes]:
    return lambda program: f"{line}\n".encode() + program


HANDLER = "densenet_handler.py"
# By test id: a file of the archive, a change of it, and the error message.
BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "model": ("model.onnx", cut, r"model\.onnx: cannot be loaded"),
    "classifier": ("classifier.npy", weights_of_another_model, "the model gives features of shape"),
    "module": (
        HANDLER,
        that_begins_with("import nothing_like_this"),
        "ModuleNotFoundError: No module named 'nothing_like_this'",
    ),
    "killed": (
        HANDLER,
        that_begins_with("import os; os.kill(os.getpid(), 9)"),
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


@pytest.mark.parametrize("kind", ["model", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_failed_start_reports_the_reason_keeps_its_logs_and_leaves_no_process(
    kind: str, archive: Path, tmp_path: Path
) -> None:
    broken = broken_archive(archive, tmp_path, kind)
    reason = f"cannot be loaded: {BROKEN[kind][2]}.* The worker's log is .*server/logs"
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
    running = start(folder / archive.name, free_ports(), 1, folder / "run")
    try:
        image = requests.post(running.predictions_url, data=PIXEL, timeout=TIMEOUT)
        assert image.status_code == 200
    finally:
        stop(running, folder / "run")
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
def in_its_folder(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this folder look like the one that the shared server was started in."""
    (tmp_path / ".run").symlink_to(run_dir)
    (tmp_path / METRICS_CONFIG).parent.mkdir(parents=True)
    (tmp_path / METRICS_CONFIG).symlink_to(METRICS_CONFIG.resolve())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_its_folder")
def test_the_running_server_is_not_stopped_if_the_new_one_cannot_start(
    running: ServerState, archive: Path, tmp_path: Path, worker_pids: Callable[[], set[int]]
) -> None:
    before = worker_pids()
    broken = broken_archive(archive, tmp_path, "model")
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
    assert worker_pids() == before
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
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start or stop clears what a killed server left; `find_running` does not."""
    monkeypatch.chdir(tmp_path)
    folder = Path(".run")
    config, log_config = (
        Path(__file__).parents[2] / name for name in (server.CONFIG, server.LOG_CONFIG)
    )
    (tmp_path / METRICS_CONFIG).parent.mkdir(parents=True)
    (tmp_path / METRICS_CONFIG).symlink_to(config.parent / METRICS_CONFIG)
    running = start(archive, free_ports(), 1, folder, config=config, log_config=log_config)
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
    again = start(archive, free_ports(), 1, folder, config=config, log_config=log_config)
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
        for host in ("evil.example", "localhost"):
            url = f"http://127.0.0.1:{port}/models/{running.model}"
            answer = requests.put(
                url, params={"min_worker": 0}, headers={"Host": host}, timeout=TIMEOUT
            )
            assert answer.status_code >= 400, url
    assert model_status(running)["minWorkers"] > 0


def test_models_cannot_be_registered_or_removed(running: ServerState, archive: Path) -> None:
    models = running.model_url.rsplit("/", 1)[0]
    management = management_session()
    answer = management.post(models, params={"url": archive.name}, timeout=TIMEOUT)
    assert answer.status_code in {403, 405}
    removal = management.delete(running.model_url, timeout=TIMEOUT)
    assert removal.status_code in {403, 405}
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
