"""Which pictures a command line means: files, folders, patterns, lists."""

import codecs
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from classification_client.reading import PassingError, judged
from classification_client.terminal import UserError, asked

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
        ".dib",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
        ".mpo",
    ]
)

# Of the kinds of files that were left out, so many are named.
_NAMED_KINDS = 5


@dataclass
class Found:
    """What a command line means.

    Attributes:
        pictures: every picture once, in the order in which they were named.
        no_pictures: files of folders that are left out, by the suffix of their names.
        others: whatever else is left out, by what it is, such as "hidden".
        closed: folders that nobody may look into, with the reason.
    """

    pictures: list[Path] = field(default_factory=list)
    no_pictures: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    closed: dict[Path, str] = field(default_factory=dict)

    @property
    def left_out(self) -> str | None:
        """A sentence on what is in the folders and not among the pictures."""
        kinds = [f"{count} {suffix}" for suffix, count in self.no_pictures.most_common()]
        if len(kinds) > _NAMED_KINDS:
            kinds[_NAMED_KINDS:] = ["..."]
        parts = [f"{count} {what}" for what, count in self.others.most_common()]
        if kinds:
            count = self.no_pictures.total()
            parts.insert(0, f"{count} not called as pictures ({', '.join(kinds)})")
        return f"Left out of the folders: {', '.join(parts)}." if parts else None


def find_pictures(sources: Iterable[str], listing: str | None = None) -> Found:
    """Every picture that is meant.

    Args:
        sources: files, folders (with all that is below them), and patterns such as "a/*.jpg".
        listing: a file with a name a line, or "-" for standard input.

    Raises:
        UserError: nothing is there, under a name that is no list's, or a folder cannot be read now.
    """
    found = Found()
    for source in sources:
        found.pictures.extend(_meant(source, found))
    if listing is not None:
        found.pictures.extend(_listed(listing))
    found.pictures = list(dict.fromkeys(found.pictures))
    if not found.pictures:
        reasons = [f"{folder} cannot be read: {why}." for folder, why in found.closed.items()]
        told = " ".join(filter(None, [found.left_out, *reasons]))
        raise UserError(f"There is no picture here. {told or _how_to_name()}")
    return found


def search(folder: Path, found: Found) -> list[Path]:
    """The pictures of a folder, in the order of their names; takes note of the rest in `found`.

    Hidden files and folders are left out, as thumbnails and such are kept there.

    Raises:
        UserError: a folder cannot be read now, but may be later.
    """
    pictures = []
    below = [folder]
    while below:
        for entry, is_folder in _entries(below.pop(), found):
            path = Path(entry.path)
            is_picture = path.suffix.lower() in SUFFIXES
            if entry.name.startswith("."):
                found.others["hidden"] += 1
            elif is_folder:
                below.append(path)
            elif entry.is_symlink() and os.path.isdir(path):  # noqa: PTH112  # raises nothing
                # It may lead back to where it is.
                found.others["link(s) to folders"] += 1
            elif is_picture and os.path.isfile(path):  # noqa: PTH113  # the same
                pictures.append(path)
            elif is_picture:
                found.others["link(s) to nothing, pipes or devices"] += 1
            else:
                found.no_pictures[path.suffix.lower() or "without a suffix"] += 1
    return sorted(pictures)


def _how_to_name() -> str:
    if asked() is None:
        return "Name files, folders, or patterns in quotes."
    return f"""Name it: {asked()} IMAGE=cat.jpg, or IMAGES="holidays more/*.jpg"."""


def _meant(source: str, found: Found) -> Iterator[Path]:
    path = Path(source)
    try:
        if path.is_dir():
            yield from search(path, found)
            return
        if path.exists():
            yield path
            return
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  # takes absolute ones
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}.") from error
    if not matches:
        raise UserError(f"{source}: there is no such file, folder, or match.")
    for match in map(Path, matches):
        yield from search(match, found) if match.is_dir() else [match]


def _entries(folder: Path, found: Found) -> list[tuple[os.DirEntry[str], bool]]:
    """What is in a folder, each with whether it is a folder itself; links are none."""
    try:
        with os.scandir(folder) as entries:
            return [(entry, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        why = judged(error, folder)
        if isinstance(why, PassingError):
            raise UserError(
                f"{folder} cannot be read now: {why.strerror}. Nothing was asked yet; run the same "
                "command again when it can."
            ) from error
        found.closed[folder] = str(error.strerror)
        return []


def _listed(listing: str) -> list[Path]:
    """Names of files that are not there are kept: each is answered on its own."""
    try:
        content = sys.stdin.buffer.read() if listing == "-" else Path(listing).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = content.decode("utf-16")
        else:
            # Names of files need not be text in any encoding.
            text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {listing} cannot be read: {error}.") from error
    # As `find -print0` writes it, for names with line ends in them.
    if "\0" in text:
        return [Path(name) for name in text.split("\0") if name]
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [Path(line) for line in lines if line.strip()]
