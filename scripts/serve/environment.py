"""Prepare what TorchServe's processes inherit: variables, temporary folder, descriptor limit.

This module imports only the standard library, because the container image uses it too.
"""

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# Variables with these prefixes would override the settings of TorchServe, Java and Python.
_OVERRIDES = ("TS_", "PYTHON", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS")
# File descriptors: a server takes about 150, and each connection one more.
MIN_DESCRIPTORS = 1024
_MAX_DESCRIPTORS = 65536
# TorchServe's longest socket name has this length.
_SOCKET_NAME = ".ts.sock.000000"


def server_environment(java_home: Path, folder: Path | str) -> dict[str, str]:
    """Return a server's environment, without variables that would override its settings.

    Args:
        java_home: home of the packaged Java; overrides `JAVA_HOME`.
        folder: for temporary files.
    """
    inherited = {n: value for n, value in os.environ.items() if not n.startswith(_OVERRIDES)}
    return inherited | {
        "JAVA_HOME": str(java_home),
        "TMPDIR": str(folder),
        "TEMP": str(folder),
        # Java's encoding of paths and format of numbers, and Python's decoding, depend on these.
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
    }


def write_properties(path: Path, text: str, settings: Mapping[str, str]) -> None:
    """Write a Java properties file, which is ASCII with escapes for other characters.

    Args:
        path: the file.
        text: its first lines, as in a properties file.
        settings: further keys and values; if a key occurs twice, the last one applies.
    """
    # A backslash in a properties file begins an escape.
    lines = (key + "=" + value.replace("\\", "\\\\") for key, value in settings.items())
    encoded = "\n".join([text, *lines, ""]).encode("utf-16-be")
    units = (int.from_bytes(encoded[at : at + 2]) for at in range(0, len(encoded), 2))
    path.write_text("".join(chr(u) if u < 128 else f"\\u{u:04x}" for u in units), "ascii")


def make_temporary_folder(run_dir: Path) -> Path:
    """Return a new folder for a server's sockets and unpacked model archives.

    It is in the user's cache if possible: in /tmp, systemd-tmpfiles and tmpwatch delete files that
    were not used for ten days.

    Raises:
        OSError: no folder can be used; the message lists the reasons.
    """
    temporary = (os.environ.get("TMPDIR") or "/tmp", "/var/tmp", "/tmp")
    parents = [run_dir.resolve(), *map(Path, temporary)]
    with suppress(RuntimeError):  # the user has no home folder
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        parents.insert(0, cache / "densenet")
    reasons = []
    for parent in parents:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="torchserve-", dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        reason = _why_unusable(folder)
        if reason is None:
            return folder
        reasons.append(f"{parent}: {reason}")
        shutil.rmtree(folder, ignore_errors=True)
    raise OSError(f"No folder can hold the server's sockets: {'; '.join(reasons)}.")


def _why_unusable(folder: Path) -> str | None:
    """Return why a folder cannot hold TorchServe's files; None if it can."""
    # Java gets this name in a URL.
    if not str(folder).isascii() or {" ", "\\"} & set(str(folder)):
        return "its name is not plain ASCII"
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        return "it is mounted noexec, and Java loads a library from it"
    path = folder / _SOCKET_NAME
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def raise_descriptor_limit() -> int | None:
    """Raise the file descriptor limit, which servers inherit; return it if it remains low.

    Connections beyond the limit hang without an error message.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MAX_DESCRIPTORS if hard == unlimited else min(hard, _MAX_DESCRIPTORS)
    if soft != unlimited and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has another, lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft if soft != unlimited and soft < MIN_DESCRIPTORS else None
