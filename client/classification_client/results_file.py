"""A file of results to which each run appends rows; a later run skips the images in it.

A killed run can leave an incomplete row at the end, which the next run truncates.
"""

import csv
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from classification_client.errors import UserError
from classification_client.results import Row, as_line, csv_line, in_words


@contextmanager
def results_file(
    path: Path, made_with: Mapping[str, Any], columns: Sequence[str] | None = None
) -> Iterator["ResultsFile"]:
    """Open or create a file of rows with the same `made_with`, see `as_line`, and lock it.

    Raises:
        UserError: the file cannot be written, is in use, or has other content.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file. Name another --output.")
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # the file is locked, or the drive does not support locks
            raise UserError(f"Another run uses {path} now ({error.strerror}).") from error
        yield ResultsFile(file, made_with, columns)


class ResultsFile:
    """Rows in a file; `done` maps the name of each image in it to its error or None."""

    def __init__(
        self, file: io.FileIO, made_with: Mapping[str, Any], columns: Sequence[str] | None
    ) -> None:
        self._file, self._made_with, self._columns = file, made_with, columns
        file.seek(0)
        content = file.read()
        self._length = content.rfind(b"\n") + 1
        try:
            rows = _parse(content[: self._length], columns)
            for row in rows:
                self._check(row, made_with)
            self.done = {row["picture"]: row.get("error") or None for row in rows}
            is_ours = bool(rows) and columns in {None, tuple(rows[0])}
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
            is_ours = False
        if content and not is_ours:
            raise UserError(
                f"{file.name} does not hold results of this command. Name another --output."
            )
        file.truncate(self._length)

    def write(self, row: Row) -> None:
        """Append a row; raise `UserError` if writing fails or another model responded."""
        self._check(self._made_with, {**self._made_with, **row.model})
        text = as_line(row, self._made_with, self._columns)
        if self._columns and not self._length:
            text = csv_line(self._columns) + text
        # File names may contain bytes that are not valid UTF-8.
        data = left = memoryview(text.encode("utf-8", "surrogateescape"))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):  # the next run truncates an incomplete row, too
                self._file.truncate(self._length)
            raise UserError(
                f"{self._file.name} cannot be written: {error.strerror}. It keeps what it holds, "
                "and the same command resumes."
            ) from error
        self._length += len(data)

    def _check(self, row: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if in_words(row) != in_words(now):
            raise UserError(
                f"{self._file.name} was made with {in_words(row)}, and this would be "
                f"{in_words(now)}. Results of both would be mixed up: use the same, or name "
                "another --output."
            )


def _parse(content: bytes, columns: Sequence[str] | None) -> Sequence[Mapping[str, Any]]:
    if columns is None:
        return [json.loads(row) for row in io.BytesIO(content)]
    text = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    return list(csv.DictReader(text, strict=True))
