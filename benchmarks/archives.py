"""Changed copies of model archives."""

import zipfile
from collections.abc import Callable
from pathlib import Path


def repack(archive: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive with changed files.

    Args:
        archive: the model archive.
        target: the copy.
        change: returns the new content for a name and content; None leaves the file out.
    """
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry, content)
    return target
