"""Find the images that a command line names: files, folders, patterns, lists."""

import codecs
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from classification_client.errors import UserError

# Suffixes of the files that are taken from folders; a named file is sent with any suffix.
_NAMES = "jpg jpeg jpe jfif png webp gif bmp dib tif tiff avif heic heif mpo"
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())


@dataclass
class Found:
    """The images that a command line names.

    Attributes:
        images: each image once, in the order of the command line; bytes for standard input.
        skipped: number of skipped files in folders, by suffix or reason.
        closed: folders that cannot be read, with the reason.
    """

    images: list[Path | bytes] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    closed: dict[Path, str] = field(default_factory=dict)

    @property
    def left_out(self) -> str | None:
        """Return a message with the counts of skipped files; None if there are none."""
        parts = [f"{count} {what}" for what, count in sorted(self.skipped.items())]
        return f"Skipped in the folders: {', '.join(parts)}." if parts else None


def find_images(sources: Sequence[str], listing: str | None = None) -> Found:
    """Return the images in files, folders, patterns such as "a/*.jpg", and a list.

    Args:
        sources: files, folders and patterns, or only "-" for an image on standard input.
        listing: a file with one name per line; "-" for standard input.

    Raises:
        UserError: there are no images, or a source does not exist.
    """
    found = Found()
    if [*sources] == ["-"]:
        return Found([sys.stdin.buffer.read()])
    named = [image for source in sources for image in _expand(source, found)]
    found.images = list(dict.fromkeys([*named, *(_read_list(listing) if listing else ())]))
    if not found.images:
        reasons = [f"{folder} cannot be read: {why}." for folder, why in found.closed.items()]
        explained = [found.left_out, *reasons, "Name files, folders, or patterns in quotes."]
        raise UserError(" ".join(filter(None, ["There is no image here.", *explained])))
    return found


def search(folder: Path, found: Found) -> list[Path]:
    """Return the images of a folder, sorted by name; count skipped files in `found`.

    Skipped are hidden files, which may be thumbnails, and links to folders, which may form a cycle.
    """
    images, closed = [], found.closed
    note = lambda error: closed.update({Path(error.filename): str(error.strerror)})  # noqa: E731
    for parent, folders, files in os.walk(folder, onerror=note):
        found.skipped.update("hidden" for name in [*folders, *files] if name[0] == ".")
        folders[:] = [name for name in folders if name[0] != "."]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in [*links, *files] if name[0] != "."):
            if path.suffix.lower() not in SUFFIXES:
                found.skipped[path.suffix.lower() or "without a suffix"] += 1
            elif os.path.isfile(path):  # noqa: PTH113  # raises nothing
                images.append(path)
            else:
                found.skipped["not regular"] += 1
    return sorted(images)


def _expand(source: str, found: Found) -> Iterator[Path]:
    try:
        exists = Path(source).exists()
        matches = [source] if exists else sorted(glob.glob(source, recursive=True))  # noqa: PTH207
        if not matches:
            raise UserError(f"{source}: there is no such file, folder, or match.")
        for match in map(Path, matches):
            yield from search(match, found) if match.is_dir() else [match]
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}.") from error


def _read_list(listing: str) -> list[Path]:
    """Return the names in a list; a missing file is reported later, in its own row."""
    try:
        content = sys.stdin.buffer.read() if listing == "-" else Path(listing).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = content.decode("utf-16")
        else:
            # File names may contain bytes that are not valid UTF-8.
            text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {listing} cannot be read: {error}.") from error
    # `find -print0` ends names with null bytes, since names may contain newlines.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [Path(name) for name in (text.split("\0") if "\0" in text else lines) if name.strip()]
