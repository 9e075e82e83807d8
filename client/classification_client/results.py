"""A row for each picture: how it came to be, and how it is written as JSON or CSV."""

import csv
import errno
import io
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from classification_client.client import (
    Classification,
    Client,
    ModelVersion,
    Prediction,
    RefusedError,
    ServiceError,
    UnavailableError,
    UnreadableError,
)
from classification_client.reading import PassingError, away, in_thread

# Statuses from here on are no mistake of the client's.
_SERVERS_FAULT = 500

# Seconds after which a folder that cannot be looked into is not there.
_LONGEST_LOOK = 5.0

# Of CSV, around the columns of the labels.
_FIRST_COLUMNS = ("picture",)
_LAST_COLUMNS = (
    "recognized",
    "error",
    "warning",
    "model",
    "model_version",
    "topk",
    "threshold",
)
_LABEL_COLUMNS = ("label", "probability", "class_id")
# The names of all labels as JSON, of a model that gives several.
LABELS_COLUMN = "labels"


@dataclass(frozen=True)
class Origin:
    """What results were made with. Every row says it, so that results are never mixed up.

    Attributes:
        model: the model's name.
        model_version: its version, with the digits that tell archives apart; "" where unknown.
        topk: how many labels were asked for; None for as many as the server gives.
        threshold: the least probability that was asked for; None for the server's.
        multilabel: whether the model gives several labels, which the model's version implies.
    """

    model: str
    model_version: str
    topk: int | None
    threshold: float | None
    multilabel: bool = field(default=False, compare=False)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Origin":
        """What a row of JSON or CSV says; `ValueError`, `KeyError` or `TypeError` if nothing."""
        topk, threshold = (row[name] for name in ("topk", "threshold"))
        return cls(
            str(row["model"]),
            str(row["model_version"]),
            None if topk in {None, ""} else int(topk),
            None if threshold in {None, ""} else float(threshold),
            LABELS_COLUMN in row,
        )

    def of(self, model: ModelVersion | None) -> "Origin":
        """The same, with the model that answered, if that is known."""
        if model is None:
            return self
        return replace(
            self, model=model.name, model_version=model.version, multilabel=model.multilabel
        )

    @property
    def in_rows(self) -> dict[str, Any]:
        """What every row says."""
        return {name: value for name, value in vars(self).items() if name in _LAST_COLUMNS}


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
        """Whether asking again would give the same: not where server or drive failed on it."""
        if isinstance(self.answer, ServiceError):
            return isinstance(self.answer, RefusedError) and self.answer.is_about_the_picture
        return not isinstance(self.answer, PassingError)

    @property
    def problem(self) -> str | None:
        """In words, where the picture has no classification."""
        if isinstance(self.answer, OSError):
            return f"cannot be read: {self.answer.strerror or self.answer}"
        return str(self.answer) if isinstance(self.answer, ServiceError) else None

    @property
    def model(self) -> ModelVersion | None:
        """Which model answered, where one did and says so."""
        known = isinstance(self.answer, (Classification, RefusedError))
        return self.answer.model if known else None  # type: ignore[union-attr]

    def as_json(self, origin: Origin) -> str:
        """One line of JSON."""
        values: dict[str, Any] = {"picture": self.picture}
        if isinstance(self.answer, Classification):
            values |= {
                "label": self.answer.label,
                "class_id": self.answer.best.class_id,
                "probability": self.answer.probability,
                "recognized": self.answer.recognized,
                "predictions": [vars(prediction) for prediction in self.answer.predictions],
            }
            if self.answer.labels is not None:
                values[LABELS_COLUMN] = [vars(label) for label in self.answer.labels]
            if self.answer.warning is not None:
                values["warning"] = self.answer.warning
        else:
            values["error"] = self.problem
        return json.dumps(values | origin.of(self.model).in_rows) + "\n"

    def as_csv(self, origin: Origin) -> str:
        """One line of CSV, in the order of `csv_columns`; for each label what the model gives."""
        labels = [""] * (labels_in_csv(origin) * len(_LABEL_COLUMNS))
        recognized = warning = all_labels = ""
        if isinstance(self.answer, Classification):
            given = [
                value
                for prediction in _best_first(self.answer)
                for value in (prediction.label, str(prediction.probability), prediction.class_id)
            ]
            # A model may have fewer classes than were asked for.
            labels = (given + labels)[: len(labels)]
            recognized = str(self.answer.recognized).lower()
            warning = self.answer.warning or ""
            names = [label.label for label in self.answer.labels or ()]
            all_labels = json.dumps(names, ensure_ascii=False)
        if origin.multilabel:
            labels.append(all_labels)
        made_with = ["" if v is None else str(v) for v in origin.of(self.model).in_rows.values()]
        values = [self.picture, *labels, recognized, self.problem or "", warning, *made_with]
        return csv_line(values)


def _best_first(answer: Classification) -> list[Prediction]:
    """The predictions; the best label, which need not be the most probable class, before others."""
    return [answer.best, *(row for row in answer.predictions if row != answer.best)]


def csv_header(origin: Origin) -> str:
    """The first line of CSV."""
    return csv_line(csv_columns(labels_in_csv(origin), multilabel=origin.multilabel))


def csv_columns(labels: int, *, multilabel: bool = False) -> tuple[str, ...]:
    """The names of the columns of CSV with so many labels for each picture."""
    more = (f"{name}_{place}" for place in range(2, labels + 1) for name in _LABEL_COLUMNS)
    every = (LABELS_COLUMN,) if multilabel else ()
    return (*_FIRST_COLUMNS, *_LABEL_COLUMNS, *more, *every, *_LAST_COLUMNS)


def labels_in_csv(origin: Origin) -> int:
    """How many labels a row of CSV has columns for."""
    return origin.topk or 1


def csv_line(values: Sequence[str]) -> str:
    """A line of CSV, all in quotes."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(values)
    return line.getvalue()


def classify_all(
    pictures: Sequence[Path], client: Client, at_once: int, take: Callable[[Row], None]
) -> None:
    """Classifies pictures, several at the same time.

    Where it raises, or is interrupted, no other picture is begun, and nobody waits for those that
    are being asked for.

    Args:
        pictures: files.
        client: who asks.
        at_once: how many at the same time.
        take: is given a row for each picture, in the order in which they are done; in this thread.

    Raises:
        UnavailableError: the server is gone; what has no row yet was not done.
        UnreadableError: so is what the pictures are on.
        RefusedError: the server refuses how it is asked, whatever the picture.
    """
    asker = _Asker(client, pictures)
    waiting: SimpleQueue[Path] = SimpleQueue()
    for picture in pictures:
        waiting.put(picture)
    done: SimpleQueue[Row | Exception] = SimpleQueue()
    stopped = threading.Event()

    def one_after_the_other() -> None:
        try:
            while not stopped.is_set():
                picture = waiting.get_nowait()
                done.put(Row(str(picture), asker.ask(picture)))
        except Empty:
            return
        except Exception as error:
            done.put(error)

    for _ in range(min(at_once, len(pictures))):
        # A server or a drive that hangs must not keep the program.
        threading.Thread(target=one_after_the_other, daemon=True).start()
    try:
        for _ in pictures:
            row = done.get()
            if isinstance(row, Exception):
                raise row
            take(row)
    finally:
        stopped.set()


class _Asker:
    """Asks for pictures, and tells what is wrong with one from what is wrong with all."""

    def __init__(self, client: Client, pictures: Sequence[Path]) -> None:
        self._client = client
        self._last_answer = 0.0
        # Folders that were waited for in vain, or are not there to begin with.
        folders = {picture.parent for picture in pictures}
        self._gone = {folder for folder in folders if not _is_there(folder)}

    def ask(self, picture: Path) -> Classification | ServiceError | OSError:
        """What becomes of a picture; raises where the others can fare no better."""
        if picture.parent in self._gone and (folder := _folder_away(picture)):
            return PassingError(errno.ENOENT, f"its folder {folder} is not there", str(picture))
        began = time.monotonic()
        try:
            answer = self._answer(picture)
        except UnavailableError as error:
            # Where the others are answered, it is this picture that the server dies of.
            if not self._others_go_on(began):
                raise
            return error
        except PassingError as error:
            # The same with what it is read from.
            if not self._others_go_on(began):
                raise UnreadableError(
                    f"{picture} cannot be read, however often it was tried: {error.strerror}."
                ) from error
            if _folder_away(picture):
                self._gone.add(picture.parent)
            return error
        except OSError as error:
            return error
        self._last_answer = time.monotonic()
        return answer

    def _answer(self, picture: Path) -> Classification | RefusedError:
        try:
            return self._client.classify(picture)
        except RefusedError as error:
            if not error.is_about_the_picture and error.code < _SERVERS_FAULT:
                raise
            return error

    def _others_go_on(self, began: float) -> bool:
        """Whether answers came to the end of the time for which one picture was tried."""
        return self._last_answer > (began + time.monotonic()) / 2


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):
        return False


def _folder_away(picture: Path) -> Path | None:
    """Its folder, if that is not there, or on a drive that does not answer."""
    try:
        return in_thread(partial(away, picture), _LONGEST_LOOK)
    except PassingError:
        return picture.parent
