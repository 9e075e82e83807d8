"""What the tests of several platforms share: containers, and a model that platforms mount."""

import json
import zipfile
from pathlib import Path

from benchmarks.containerized import FENCED, READY_TIMEOUT, Answer, Container, container

__all__ = ["FENCED", "READY_TIMEOUT", "Answer", "Container", "container"]
# Before each class's name in the mounted archive, so that its answers can be told.
OTHER = "other_"


def other_archive(archive: Path, path: Path) -> Path:
    """Write the same model with other names of its classes."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "index_to_name.json":
                classes = json.loads(content).items()
                renamed = {i: [id_, OTHER + label] for i, (id_, label) in classes}
                content = json.dumps(renamed).encode()
            new.writestr(name, content)
    return path


def readable(folder: Path) -> Path:
    """Let the image's user read what a test made for itself."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
