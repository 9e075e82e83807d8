"""A server is independent of the variables, folders and limits of the machine that starts it."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from deploy.container import readiness
from scripts.serve import environment, preflight
from scripts.serve.environment import make_temporary_folder, server_environment, write_properties

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
NOWHERE = "http://127.0.0.1:9"


def test_a_server_inherits_only_variables_that_cannot_break_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables = {
        "TS_CONFIG_FILE": "old.properties",
        "TS_MODEL_SERVER_HOME": "/nonexistent",
        "JAVA_HOME": "/usr/lib/jvm/java-8",
        "_JAVA_OPTIONS": "-Xmx10m",
        "JAVA_TOOL_OPTIONS": "-javaagent:gone.jar",
        "PYTHONPATH": "/other/modules",
        "PYTHONWARNINGS": "error",
        "LC_ALL": "de_DE.ISO-8859-1",
        "TMPDIR": "/tmp/of/the/shell",
    }
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    usual = server_environment(tmp_path / "java", tmp_path)
    for name, value in (variables | {"CUDA_VISIBLE_DEVICES": "1"}).items():
        monkeypatch.setenv(name, value)
    found = server_environment(tmp_path / "java", tmp_path)
    assert found == usual | {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_properties_file_escapes_backslashes_and_non_ascii_letters(tmp_path: Path) -> None:
    path = tmp_path / "p"
    write_properties(path, "# ü\na=\\\n  b", {"model_store": r"/my\new prüfung-分類/😀"})
    assert path.read_bytes() == (
        b"# \\u00fc\na=\\\n  b\n"
        b"model_store=/my\\\\new pr\\u00fcfung-\\u5206\\u985e/\\ud83d\\ude00\n"
    )


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


def test_a_servers_files_are_where_no_cleaner_of_temporary_files_deletes_them(
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


@pytest.mark.parametrize("name", ["a" * 90, "a folder", "prüfung", "a\\folder"])
def test_a_path_unfit_for_sockets_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / name
    monkeypatch.setenv("TMPDIR", str(long))
    assert _folder_of(long, long, monkeypatch) == Path("/var/tmp")


def test_an_error_names_why_each_folder_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "_why_unusable", lambda _: "it is mounted noexec")
    with pytest.raises(OSError, match=f"sockets: .*{tmp_path}: it is mounted noexec; /"):
        make_temporary_folder(tmp_path)


def test_a_low_limit_of_file_descriptors_is_raised_or_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert environment.raise_descriptor_limit() is None
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised == (65536 if hard == resource.RLIM_INFINITY else min(65536, hard))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    preflight.warn_of_descriptors()
    assert "At most 256 files can be open" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["", "internal.example"])
def test_loopback_is_reached_without_a_proxy_and_other_hosts_through_it(given: str) -> None:
    code = (
        "import scripts, requests.utils\n"
        "for host in ('127.0.0.1:8081', 'localhost', '[::1]:8081', 'example.org',"
        " 'internal.example'):\n"
        "    url = f'http://{host}/'\n"
        "    print(requests.utils.should_bypass_proxies(url, no_proxy=None))"
    )
    variables = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy")}
    for name in PROXIES:
        variables |= {name: NOWHERE, name.upper(): NOWHERE}
    if given:
        variables["no_proxy"] = given
    printed = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True)
    assert printed.split() == ["True"] * 3 + ["False", str(bool(given))]


def test_the_containers_readiness_probe_uses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, NOWHERE)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    connect = MagicMock(side_effect=ConnectionRefusedError("refused"))
    monkeypatch.setattr(socket, "create_connection", connect)
    assert "refused" in str(readiness.why_not_ready(10))
    assert [call.args[0] for call in connect.call_args_list] == [("127.0.0.1", 10)]
