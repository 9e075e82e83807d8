"""Unpack the model archive on each node and load its handler.

The archive's own code decodes and classifies, so results equal the server's. As with TorchServe,
anyone who can write an archive can run code.
"""

import hashlib
import os
import stat
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

# Hexadecimal digits of the archive's SHA-256 in the name of its folder.
_DIGITS = 16


@dataclass(frozen=True)
class Archive:
    """An archive that each node can load.

    Attributes:
        sha256: SHA-256 of the file, in hexadecimal digits.
        content: its bytes, in Ray's object store.
        root: the folder that nodes unpack into; None for one in each node's temporary folder.
    """

    sha256: str
    content: "ray.ObjectRef[bytes]"
    root: str | None = None

    def stages(self) -> ModuleType:
        """Return the module `batch.stages`, with the archive's handler loaded."""
        load_handler_from(self.folder())
        from batch import stages  # imports the archive's handler

        return stages

    def folder(self) -> Path:
        """Return the folder of the unpacked archive; unpack it on this node's first call."""
        folder = _root(self.root) / self.sha256[:_DIGITS]
        if not folder.is_dir():
            unpack(ray.get(self.content), self.sha256, folder)
        return folder


def unpack(content: bytes, sha256: str, folder: Path) -> None:
    """Unpack an archive atomically; safe to call from several processes at the same time.

    Raises:
        ValueError: the content has a different SHA-256.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("the archive changed on its way")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary, "archive")
        with tempfile.TemporaryFile() as file:
            file.write(content)
            with zipfile.ZipFile(file) as packed:
                packed.extractall(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise


def load_handler_from(folder: Path) -> None:
    """Make this process import `handler` from an unpacked archive.

    Raises:
        RuntimeError: the process has already imported another handler.
    """
    loaded: Any = sys.modules.get("handler")
    if loaded is not None:
        if Path(loaded.__file__).parent.parent == folder:
            return
        if any(name.startswith("handler.") for name in sys.modules):
            raise RuntimeError(f"this process has the handler of {loaded.__file__} already")
        # `scripts` has imported only the package itself, which can be replaced.
        del sys.modules["handler"]
    sys.path.insert(0, str(folder))


def _root(given: str | None) -> Path:
    """Return the folder to unpack archives in.

    Raises:
        PermissionError: it belongs to another user, or others may write to it.
    """
    root = Path(given or Path(tempfile.gettempdir(), f"classify-batch-{os.getuid()}"))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    if status.st_uid != os.getuid() or not private:
        raise PermissionError(f"{root} belongs to another user, or others may write to it")
    return root
