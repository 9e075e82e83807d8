"""Model archives for benchmarks, and changed copies of archives."""

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.images import encode, photograph
from scripts.build.model_file import from_options
from scripts.build.pipeline import build


@contextmanager
def workspace(**model: Any) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder and a model archive in it, by default with random weights.

    The folder has the image `small.jpg`, which servers get as their first request.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "small.jpg").write_bytes(encode(photograph(720, 720), quality=90))
        spec = from_options(**({"arch": "densenet121", "weights": "random"} | model))
        yield work, build(spec, work / "store")


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
