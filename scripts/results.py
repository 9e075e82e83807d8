"""A row for each picture, and the file that keeps them so that a run can go on where it stopped."""

import asyncio
import csv
import fcntl
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from scripts.client import (
    AsyncClient,
    Classification,
    RefusedError,
    ServiceError,
    UnavailableError,
)
from scripts.terminal import UserError

# Statuses from here on are no mistake of the client's.
_SERVERS_FAULT = 500

_COLUMNS = ("picture", "label", "class_id", "probability", "recognized", "error")


@dataclass(frozen=True)
class Row:
    """What became of one picture.

    Attributes:
        picture: its name, as the command line or the list has it.
        answer: how it was classified, or why it was not.
    """

    picture: str
    answer: Classification | ServiceError | OSError

    @property
    def is_final(self) -> bool:
        """Whether asking again would give the same: not where the server failed on it."""
        return not isinstance(self.answer, ServiceError) or (
            isinstance(self.answer, RefusedError) and self.answer.is_about_the_picture
        )

    @property
    def problem(self) -> str | None:
        """In words, where the picture has no classification."""
        if isinstance(self.answer, OSError):
            return f"cannot be read: {self.answer.strerror or self.answer}"
        return str(self.answer) if isinstance(self.answer, ServiceError) else None

    def as_json(self) -> str:
        """One line of JSON."""
        values: dict[str, Any] = {"picture": self.picture}
        if isinstance(self.answer, Classification):
            values |= {
                "label": self.answer.label,
                "class_id": self.answer.predictions[0].class_id,
                "probability": self.answer.probability,
                "recognized": self.answer.recognized,
                "predictions": [vars(prediction) for prediction in self.answer.predictions],
            }
            if self.answer.warning is not None:
                values["warning"] = self.answer.warning
        else:
            values["error"] = self.problem
        return json.dumps(values) + "\n"

    def as_csv(self) -> str:
        """One line of CSV, in the order of the columns."""
        if isinstance(self.answer, Classification):
            best = self.answer.predictions[0]
            recognized = str(self.answer.recognized).lower()
            values = [best.label, best.class_id, str(best.probability), recognized, ""]
        else:
            values = ["", "", "", "", self.problem or ""]
        return _csv_line([self.picture, *values])


def _csv_line(values: Sequence[str]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(values)
    return line.getvalue()


async def classify_all(
    pictures: Sequence[Path],
    client: AsyncClient,
    at_once: int,
    take: Callable[[Row], None],
) -> None:
    """Classifies pictures, each as soon as it is its turn.

    Args:
        pictures: files.
        client: who asks.
        at_once: how many at the same time.
        take: is given a row for each picture, in the order in which they are done.

    Raises:
        UnavailableError: the server is gone; what has no row yet was not done.
        RefusedError: it refuses how it is asked, whatever the picture.
    """
    left = iter(pictures)
    last_answer = 0.0

    async def one_after_the_other() -> None:
        nonlocal last_answer
        for picture in left:
            began = time.monotonic()
            try:
                answer: Classification | ServiceError | OSError = await client.classify(picture)
                last_answer = time.monotonic()
            except UnavailableError as error:
                # Where the others are answered, it is this picture that the server dies of.
                if last_answer <= began:
                    raise
                answer = error
            except RefusedError as error:
                if not error.is_about_the_picture and error.code < _SERVERS_FAULT:
                    raise
                answer = error
            except (OSError, ValueError) as error:  # the latter for a name that cannot be a file's
                answer = error if isinstance(error, OSError) else OSError(str(error))
            take(Row(str(picture), answer))

    tasks = [asyncio.create_task(one_after_the_other()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def classify_now(
    pictures: Sequence[Path], client: AsyncClient, at_once: int, take: Callable[[Row], None]
) -> None:
    """`classify_all` for callers without an event loop; ends the client's connections."""

    async def all_of_them() -> None:
        async with client:
            await classify_all(pictures, client, at_once, take)

    asyncio.run(all_of_them())


class ResultsFile:
    """Rows in a file, one at most for each picture; what was being written is written anew.

    Attributes:
        done: the pictures that have a row, each with its error, if that is what the row says.
    """

    def __init__(self, file: TextIO, *, as_csv: bool, path: Path) -> None:
        """Reads what is there; `UserError` where it is not from this command."""
        self._file = file
        self._path = path
        self._as_csv = as_csv
        text = file.read()
        try:
            self.done, length = (_read_csv if as_csv else _read_jsonl)(text)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(
                f"{path} holds something else than results of this command. Name another file."
            ) from error
        if length < len(text):
            # The last row was cut off in the middle of writing.
            file.seek(0)
            file.truncate()
            self._append(text[:length])
        if as_csv and length == 0:
            self._append(_csv_line(_COLUMNS))

    def write(self, row: Row) -> None:
        """Adds a row; it is kept from then on, whatever happens to this process.

        Raises:
            UserError: the disk takes no more.
        """
        self._append(row.as_csv() if self._as_csv else row.as_json())

    def _append(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}.") from error


def _read_jsonl(text: str) -> tuple[dict[str, str | None], int]:
    """Pictures with their errors, and how much of the text is whole rows."""
    length = text.rfind("\n") + 1
    if not length and text and not text.startswith('{"picture": "'[: len(text)]):
        raise ValueError("no row")
    rows = [json.loads(line) for line in text[:length].split("\n")[:-1]]
    return {row["picture"]: row.get("error") for row in rows}, length


def _read_csv(text: str) -> tuple[dict[str, str | None], int]:
    """The same; a row may have line ends in it."""
    header = _csv_line(_COLUMNS)
    if not text.startswith(header):
        if text and not header.startswith(text):
            raise ValueError("other columns")
        return {}, 0
    length = text.rfind("\n") + 1
    while True:
        try:
            rows = list(csv.reader(io.StringIO(text[:length], newline=""), strict=True))
            break
        except csv.Error:  # cut off within quotes
            length = text.rfind("\n", 0, length - 1) + 1
    if any(len(row) != len(_COLUMNS) for row in rows):
        raise ValueError("other columns")
    return {row[0]: row[-1] or None for row in rows[1:]}, length


@contextmanager
def results_file(path: Path, *, as_csv: bool) -> Iterator[ResultsFile]:
    """Opens or makes a file of results for this process alone.

    Raises:
        UserError: it cannot be written, is in use, or holds something else.
    """
    try:
        # Names of files need not be text in any encoding.
        file = path.open("a+", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Another run writes to {path} now.") from error
        file.seek(0)
        yield ResultsFile(file, as_csv=as_csv, path=path)
