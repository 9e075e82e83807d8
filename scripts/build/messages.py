"""Read a user's files, and word what is wrong with them."""

from collections.abc import Iterable
from pathlib import Path

from scripts.terminal import UserError, printable


def read_bytes(path: Path, what: str, limit: int | None = None) -> bytes:
    """Return the content of a file, which messages call `what`, as in "list of classes"."""
    try:
        with path.open("rb") as file:
            content = file.read(-1 if limit is None else limit + 1)
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    if limit is not None and len(content) > limit:
        raise UserError(f"The {what} {path} is larger than {limit / 1e6:g} MB.")
    return content


def first_line(error: Exception) -> str:
    """Return the first line of a library's error; its type if it has no text."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def listed(items: Iterable[str], *, limit: int = 3, separator: str = ", ") -> str:
    """Return the first few of some names or sentences, and the number of others."""
    texts = [printable(item) for item in items]
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return separator.join(texts[:limit] + more)
