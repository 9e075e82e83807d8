"""What servers inherit from a machine whose variables, folders and limits are unusual."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.container import ready
from scripts.serve import environment, preflight
from scripts.serve.environment import make_temporary_folder, server_environment, write_properties

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TS_CONFIG_FILE", "old.properties"),
        ("TS_MODEL_SERVER_HOME", "/nonexistent"),
        ("JAVA_HOME", "/usr/lib/jvm/java-8"),
        ("_JAVA_OPTIONS", "-Xmx10m"),
        ("JAVA_TOOL_OPTIONS", "-javaagent:gone.jar"),
        ("PYTHONPATH", "/other/modules"),
        ("PYTHONWARNINGS", "error"),
        ("LC_ALL", "de_DE.ISO-8859-1"),
        ("TMPDIR", "/tmp/of/the/shell"),
    ],
)
def test_no_variable_changes_what_is_started(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(name, raising=False)
    usual = server_environment(tmp_path / "java", tmp_path)
    monkeypatch.setenv(name, value)
    assert server_environment(tmp_path / "java", tmp_path) == usual


def test_a_server_inherits_the_other_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert server_environment(tmp_path, tmp_path)["CUDA_VISIBLE_DEVICES"] == "1"


def test_java_reads_other_letters_from_a_properties_file(tmp_path: Path) -> None:
    write_properties(tmp_path / "p", "model_store=/prüfung-分類/😀\n")
    text = (tmp_path / "p").read_bytes()
    assert text == b"model_store=/pr\\u00fcfung-\\u5206\\u985e/\\ud83d\\ude00\n"


def _folder_of(home: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = make_temporary_folder(run_dir)
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.iterdir()) == []
    folder.rmdir()
    return folder.parent


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose sockets have short names, which pytest's have not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_servers_files_are_where_no_cleaner_looks(
    monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    run_dir, home = short_path / "run", short_path / "home"
    cache = home / ".cache" / "densenet"
    assert _folder_of(home, run_dir, monkeypatch) == cache
    # These cannot hold the sockets; what was tried leaves nothing behind.
    other = short_path / "prüfung"
    assert _folder_of(other, run_dir, monkeypatch) == run_dir
    assert list((other / ".cache" / "densenet").iterdir()) == []
    (short_path / "file").touch()
    assert _folder_of(short_path / "file", run_dir, monkeypatch) == run_dir


@pytest.mark.parametrize("name", ["a" * 90, "a folder", "prüfung"])
def test_a_path_that_is_too_long_or_has_other_letters_is_no_place_for_sockets(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / name
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(long))
    assert _folder_of(long, long, monkeypatch) == Path("/var/tmp")


def test_the_reasons_are_named_if_no_folder_can_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "_why_unusable", lambda _: "it is mounted noexec")
    with pytest.raises(OSError, match=f"sockets: .*{tmp_path}: it is mounted noexec; /"):
        make_temporary_folder(tmp_path)


def _limited(limit: int, code: str) -> str:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(7)[1]))

    return subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit_files, stdout=-1, text=True, check=True
    ).stdout


def test_a_low_limit_of_file_descriptors_is_raised() -> None:
    code = (
        "import resource; from scripts.serve.environment import raise_descriptor_limit as limit\n"
        "print(limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    raised = min(65536, hard) if hard != resource.RLIM_INFINITY else 65536
    assert _limited(256, code).split() == ["None", str(raised)]


def test_a_limit_of_file_descriptors_that_stays_low_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    preflight.warn_of_descriptors()
    assert "At most 256 files can be open" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["", "internal.example"])
@pytest.mark.parametrize("proxy", [*PROXIES, *map(str.upper, PROXIES)])
def test_loopback_is_asked_through_no_proxy_and_other_hosts_are(proxy: str, given: str) -> None:
    code = (
        "import scripts, requests.utils\n"
        "for host in ('127.0.0.1:8081', 'localhost', '[::1]:8081', 'example.org',"
        " 'internal.example'):\n"
        "    url = f'http://{host}/'\n"
        "    print(requests.utils.should_bypass_proxies(url, no_proxy=None))"
    )
    inherited = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy")}
    variables = inherited | {proxy: NOWHERE, **({"no_proxy": given} if given else {})}
    printed = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True)
    assert printed.split() == ["True"] * 3 + ["False", str(bool(given))]


def test_the_containers_readiness_is_asked_through_no_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    # Port 10 itself refuses the connection, and not the proxy at port 9.
    opened = []
    create = socket.create_connection

    def connect(address: tuple[str, int], *arguments: Any) -> socket.socket:
        opened.append(address)
        return create(address, *arguments)

    monkeypatch.setattr(socket, "create_connection", connect)
    assert "refused" in str(ready.why_not_ready(10))
    assert opened == [("127.0.0.1", 10)]
