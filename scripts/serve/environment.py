"""What TorchServe's processes inherit: variables, the folder of their files, file descriptors.

It imports the standard library only, because the container image starts TorchServe with it too.
"""

import os
import resource
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

# TorchServe, Java and Python read these instead of what the commands configure.
_OVERRIDES = ("TS_", "PYTHON", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS")
# Each connection takes one, and a server without any about 150.
MIN_DESCRIPTORS = 1024
_MAX_DESCRIPTORS = 65536
# As long as the longest name of a socket of TorchServe.
_SOCKET_NAME = ".ts.sock.000000"


def server_environment(java_home: Path, folder: Path | str) -> dict[str, str]:
    """Return the variables of a server, without those that would change what is started.

    Args:
        java_home: of the packaged Java, whatever `JAVA_HOME` is.
        folder: for temporary files.
    """
    inherited = {n: value for n, value in os.environ.items() if not n.startswith(_OVERRIDES)}
    return inherited | {
        "JAVA_HOME": str(java_home),
        "TMPDIR": str(folder),
        "TEMP": str(folder),
        # Java encodes paths and formats numbers by the locale, Python decodes files by it.
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
    }


def write_properties(path: Path, text: str) -> None:
    """Write a Java properties file, which is Latin-1 with escapes for other characters."""
    encoded = text.encode("utf-16-be")
    units = (int.from_bytes(encoded[at : at + 2]) for at in range(0, len(encoded), 2))
    path.write_text("".join(chr(u) if u < 128 else f"\\u{u:04x}" for u in units), "ascii")


def make_temporary_folder(run_dir: Path) -> Path:
    """Return a new folder for a server's sockets and unpacked model archives.

    It is in the user's cache, if that can be used: in /tmp systemd-tmpfiles and tmpwatch delete
    what was not touched for ten days.

    Raises:
        OSError: no folder can be used; the message has the reasons.
    """
    reasons = []
    for parent in (*_cache(), run_dir.resolve(), *_temporary()):
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


def _cache() -> list[Path]:
    with suppress(RuntimeError):  # this user has no home
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return [Path(home, "densenet")]
    return []


def _temporary() -> list[Path]:
    with suppress(FileNotFoundError):  # none can be written to
        return [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/tmp")]
    return []


def _why_unusable(folder: Path) -> str | None:
    """Return why a folder cannot hold TorchServe's files; None if it can."""
    if not str(folder).isascii() or " " in str(folder):
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
    """Raise the limit of file descriptors, which servers inherit; return it if it is low.

    Connections beyond it hang, without a message.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MAX_DESCRIPTORS if hard == unlimited else min(hard, _MAX_DESCRIPTORS)
    if soft != unlimited and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft if soft != unlimited and soft < MIN_DESCRIPTORS else None
