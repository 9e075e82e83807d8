"""Which pictures a command line means: files, folders, patterns, lists."""

import glob
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.terminal import UserError

# What is taken from a folder; a file that is named is sent whatever it is called.
SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
        ".mpo",
    ]
)


def find_pictures(sources: Iterable[str], listing: str | None = None) -> list[Path]:
    """Every picture that is meant, once, in the order in which it was named.

    Args:
        sources: files, folders (with all that is below them), and patterns such as "a/*.jpg".
        listing: a file with a name a line, or "-" for standard input.

    Raises:
        UserError: nothing is there, under a name that is no list's.
    """
    named = [path for source in sources for path in _meant(source)]
    listed = [] if listing is None else list(_listed(listing))
    found = list(dict.fromkeys([*named, *listed]))
    if not found:
        raise UserError("There is no picture here. Name files, folders, or patterns in quotes.")
    return found


def _meant(source: str) -> Iterator[Path]:
    path = Path(source)
    if path.is_dir():
        yield from _in_folder(path)
    elif path.exists():
        yield path
    else:
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  # takes absolute ones
        if not matches:
            raise UserError(f"{source}: there is no such file, folder, or match.")
        for match in matches:
            yield from _in_folder(Path(match)) if Path(match).is_dir() else [Path(match)]


def _in_folder(folder: Path) -> Iterator[Path]:
    """Hidden files and folders are left out, as thumbnails and such are kept there."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _listed(listing: str) -> Iterator[Path]:
    """Names of files that are not there are kept: each is answered on its own."""
    try:
        text = sys.stdin.read() if listing == "-" else Path(listing).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {listing} cannot be read: {error}.") from error
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return (Path(line) for line in lines if line.strip())
