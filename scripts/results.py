"""A row for each picture, and the file that keeps them so that a run can go on where it stopped."""

import asyncio
import csv
import fcntl
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from scripts.client import AsyncClient, Classification, RefusedError
from scripts.terminal import UserError

_COLUMNS = ("picture", "label", "class_id", "probability", "recognized", "error")


@dataclass(frozen=True)
class Row:
    """What became of one picture.

    Attributes:
        picture: its name, as the command line or the list has it.
        answer: how it was classified, or why it will not be: what asking again does not change.
    """

    picture: str
    answer: Classification | RefusedError | OSError

    @property
    def problem(self) -> str | None:
        """In words, where the picture has no classification."""
        if isinstance(self.answer, OSError):
            return f"cannot be read: {self.answer.strerror or self.answer}"
        return str(self.answer) if isinstance(self.answer, RefusedError) else None

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
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
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
    """
    left = iter(pictures)

    async def one_after_the_other() -> None:
        for picture in left:
            try:
                answer: Classification | RefusedError | OSError = await client.classify(picture)
            except (RefusedError, OSError) as error:
                answer = error
            take(Row(str(picture), answer))

    tasks = [asyncio.create_task(one_after_the_other()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ResultsFile:
    """Rows in a file, one at most for each picture; what was being written is written anew."""

    def __init__(self, file: TextIO, *, as_csv: bool, path: Path) -> None:
        """Reads what is there; `UserError` where it is not from this command."""
        self._file = file
        self._as_csv = as_csv
        self.done = self._read(path)

    def write(self, row: Row) -> None:
        """Adds a row; it is kept from then on, whatever happens to this process."""
        self._file.write(row.as_csv() if self._as_csv else row.as_json())
        self._file.flush()

    def _read(self, path: Path) -> set[str]:
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            # The last row was cut off in the middle of writing.
            self._file.seek(0)
            self._file.truncate()
            self._file.write(whole)
            self._file.flush()
        try:
            if self._as_csv:
                return self._read_csv(whole)
            return {json.loads(line)["picture"] for line in whole.splitlines()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} holds something else than results of this command. Name another file."
            ) from error

    def _read_csv(self, text: str) -> set[str]:
        rows = list(csv.reader(io.StringIO(text)))
        if not rows:
            self._file.write(_csv_line(_COLUMNS))
            self._file.flush()
            return set()
        if rows[0] != list(_COLUMNS) or any(len(row) != len(_COLUMNS) for row in rows):
            raise ValueError("other columns")
        return {row[0] for row in rows[1:]}


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
