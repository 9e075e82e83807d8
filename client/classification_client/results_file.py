"""The file that keeps rows, so that a run can go on where another one stopped.

It only ever grows by whole rows. What a killed run left of a row is cut off in its place, so that
there is no moment in which a whole row is missing.
"""

import csv
import fcntl
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from classification_client.client import ModelVersion
from classification_client.results import (
    LABELS_COLUMN,
    Origin,
    Row,
    csv_columns,
    csv_header,
    csv_line,
)
from classification_client.terminal import UserError, spelt

# How a row of JSON lines begins.
_JSON_BEGINS = b'{"picture": "'


class ResultsFile:
    """Rows in a file, one at most for each picture, all made with the same.

    Attributes:
        done: the pictures that have a row, each with its error, if that is what the row says.
        origin: what they are made with; its model is the file's where there are rows.
        path: the file's name.
    """

    def __init__(self, descriptor: int, path: Path, *, as_csv: bool, origin: Origin) -> None:
        """Reads what is there.

        Args:
            descriptor: of the file, open for reading and appending, and locked.
            path: its name.
            as_csv: CSV, not JSON lines.
            origin: what this run asks for; the model is not looked at yet.

        Raises:
            UserError: the rows are not from this command, or were made with something else.
        """
        self._descriptor = descriptor
        self.path = path
        self._as_csv = as_csv
        with open(descriptor, "rb", closefd=False) as file:  # it is open already
            content = file.read()
        try:
            rows, self._length = (_read_csv if as_csv else _read_jsonl)(content)
            self.done = {row["picture"]: row.get("error") or None for row in rows}
            origins = list(dict.fromkeys(map(Origin.of_row, rows)))
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(
                f"{path} holds something else than results of this command as it is now. "
                f"Name another {spelt('output')}."
            ) from error
        self.origin = origins[0] if origins else origin
        for other in origins[1:]:
            self._refuse(other, "also with")
        self._compare(replace(self.origin, topk=origin.topk, threshold=origin.threshold))
        if self._length < len(content):
            try:
                self._cut()
            except OSError as error:
                raise self._not_written(error) from error

    def made_by(self, model: ModelVersion) -> None:
        """Says which model serves now; `UserError` where the rows are of another one."""
        if self.done:
            self._compare(self.origin.of(model))
        else:
            self.origin = self.origin.of(model)

    def write(self, row: Row) -> None:
        """Adds a row; it is kept from then on, whatever happens to this process.

        Raises:
            UserError: the disk takes no more, the file is gone, or another model answered.
        """
        self._compare(self.origin.of(row.model))
        text = row.as_csv(self.origin) if self._as_csv else row.as_json(self.origin)
        if self._as_csv and not self._length:
            text = csv_header(self.origin) + text
        self._check_place()
        # Names of files need not be text in any encoding.
        self._append(text.encode("utf-8", "surrogateescape"))

    def keep(self) -> None:
        """Has all rows on the disk itself; `UserError` where a drive could not keep them."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._not_written(error) from error

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            with suppress(OSError):  # else the next run cuts off the part of a row
                self._cut()
            raise self._not_written(error) from error
        self._length += len(line)

    def _cut(self) -> None:
        """Takes off what is behind the last whole row."""
        os.ftruncate(self._descriptor, self._length)

    def _check_place(self) -> None:
        try:
            same = os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.path} was moved or deleted while this run wrote to it. What is missing "
                "in it is asked for by the same command."
            )

    def _compare(self, now: Origin) -> None:
        if now != self.origin:
            self._refuse(now, "and this would be")

    def _refuse(self, other: Origin, but: str) -> None:
        """Names what differs."""
        old, new = _in_words(self.origin, other)
        raise UserError(
            f"{self.path} was made with {old}, {but} {new}. Results of both would be mixed up: "
            f"go on with what it was made with, or name another {spelt('output')}."
        )

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written: {error.strerror}. What is in it is kept; when that "
            "is mended, the same command goes on."
        )


def _in_words(one: Origin, other: Origin) -> tuple[str, str]:
    """Both, as far as they differ."""
    words: list[tuple[str, str]] = []
    models = (_model_in_words(one), _model_in_words(other))
    if models[0] != models[1]:
        words.append(models)
    for option, a, b in (
        ("topk", one.topk, other.topk),
        ("threshold", one.threshold, other.threshold),
    ):
        if a != b:
            words.append((_option_in_words(option, a), _option_in_words(option, b)))
    old, new = zip(*words, strict=True)
    return " and ".join(old), " and ".join(new)


def _model_in_words(origin: Origin) -> str:
    return str(ModelVersion(origin.model, origin.model_version or "of unknown version"))


def _option_in_words(option: str, value: float | None) -> str:
    return f"no {spelt(option)}" if value is None else spelt(option, value)


def _read_jsonl(content: bytes) -> tuple[list[Mapping[str, Any]], int]:
    """The whole rows, and how many bytes they are."""
    length = content.rfind(b"\n") + 1
    if not length and not _JSON_BEGINS.startswith(content[: len(_JSON_BEGINS)]):
        raise ValueError("no row")
    return [json.loads(line) for line in content[:length].split(b"\n")[:-1]], length


def _read_csv(content: bytes) -> tuple[list[Mapping[str, Any]], int]:
    """The same; a row may have line ends in it."""
    length = content.rfind(b"\n") + 1
    while True:
        text = content[:length].decode("utf-8", "surrogateescape")
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
            break
        except csv.Error:  # cut off within quotes
            length = content.rfind(b"\n", 0, length - 1) + 1
    if not rows:
        # Nothing, or a header that was cut off, however many labels it is for.
        begun = content.count(b'"label') or 1
        headers = [
            csv_line(csv_columns(labels, multilabel=multilabel)).encode()
            for labels in (begun - 1, begun, begun + 1)
            for multilabel in (False, True)
        ]
        if not any(header.startswith(content) for header in headers):
            raise ValueError("no header")
        return [], 0
    header, *rows = rows
    multilabel = LABELS_COLUMN in header
    labels = sum(name.startswith("label") for name in header) - multilabel
    if tuple(header) != csv_columns(labels, multilabel=multilabel):
        raise ValueError("other columns")
    # Without a row the header may be one for another number of labels.
    return [_named(header, row) for row in rows], length if rows else 0


def _named(header: Sequence[str], row: Sequence[str]) -> Mapping[str, Any]:
    return dict(zip(header, row, strict=True))


@contextmanager
def results_file(path: Path, *, as_csv: bool, origin: Origin) -> Iterator[ResultsFile]:
    """Opens or makes a file of results for this process alone; arguments as of `ResultsFile`.

    Raises:
        UserError: it cannot be written, is in use, holds something else, or was made otherwise.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is no file that could be gone on with. Name another one.")
        _lock(descriptor, path)
        yield ResultsFile(descriptor, path, as_csv=as_csv, origin=origin)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"Another run writes to {path} now. Let it end, or name another {spelt('output')}."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be kept from being written to by two runs at once, as its drive has "
            f"no locks ({error.strerror}). Name a file on another drive."
        ) from error
