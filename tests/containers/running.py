"""Containers, and an archive of DenseNet-121 that platforms mount."""

import json
from pathlib import Path

from benchmarks.archives import repack
from benchmarks.containerized import FENCED, READY_TIMEOUT, Answer, Container, container

__all__ = ["FENCED", "READY_TIMEOUT", "Answer", "Container", "container"]
# Prefix of the labels in the mounted archive, to recognize its responses.
OTHER = "other_"


def other_archive(archive: Path, path: Path) -> Path:
    """Write a copy of the archive with other labels."""

    def change(name: str, content: bytes) -> bytes:
        if name != "index_to_name.json":
            return content
        classes = json.loads(content).items()
        return json.dumps({i: [id_, OTHER + label] for i, (id_, label) in classes}).encode()

    return repack(archive, path, change)


def readable(folder: Path) -> Path:
    """Let the image's user read a test's files."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
