"""The archive, on each node: its own code decodes and classifies, so that answers are the served.

Whoever can write an archive decides what runs, as with TorchServe.
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

# Of the archive's SHA-256 in the name of its folder.
_DIGITS = 16


class ForeignFolderError(RuntimeError):
    """A folder that code would be loaded from is somebody else's, or open to others."""


@dataclass(frozen=True)
class Archive:
    """An archive that nodes can get at.

    Attributes:
        sha256: of the file, in hexadecimal digits.
        content: its bytes, in Ray's object store.
        root: the folder that nodes unpack into; None for one in each node's temporary folder.
    """

    sha256: str
    content: "ray.ObjectRef[bytes]"
    root: str | None = None

    def stages(self) -> ModuleType:
        """The module `batch.stages`, with the archive's handler behind it."""
        folder = self.folder()
        enter(folder)
        from batch import stages  # imports the archive's handler

        return stages

    def folder(self) -> Path:
        """The unpacked archive; the first process of a node that needs it makes it."""
        folder = _root(self.root) / self.sha256[:_DIGITS]
        if not folder.is_dir():
            unpack(ray.get(self.content), self.sha256, folder)
        return folder


def unpack(content: bytes, sha256: str, folder: Path) -> None:
    """Unpacks an archive, whole or not at all; another process may do the same.

    Raises:
        ValueError: the bytes are not those of this hash.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("the archive changed on its way")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary, "archive")
        with tempfile.TemporaryFile() as file:
            file.write(content)
            with zipfile.ZipFile(file) as packed:
                packed.extractall(whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def enter(folder: Path) -> None:
    """Makes this process import `handler` from an unpacked archive.

    Raises:
        RuntimeError: it has imported another one already.
    """
    loaded: Any = sys.modules.get("handler")
    if loaded is not None:
        if Path(loaded.__file__).parent.parent == folder:
            return
        if any(name.startswith("handler.") for name in sys.modules):
            raise RuntimeError(f"this process has the handler of {loaded.__file__} already")
        # Nothing but the package itself, which `scripts` imports for its first lines.
        del sys.modules["handler"]
    sys.path.insert(0, str(folder))


def _root(given: str | None) -> Path:
    """Where archives are unpacked: this user's alone, since code is loaded from there."""
    root = Path(given or Path(tempfile.gettempdir(), f"classify-batch-{os.getuid()}"))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    if status.st_uid != os.getuid() or not private:
        raise ForeignFolderError(f"{root} belongs to another user, or others may write to it")
    return root
