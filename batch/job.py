"""Describe a batch job and its folder of results, from which it can be resumed."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from batch import parts, schema, storage
from batch.storage import Place

# Readers of Parquet folders skip names that begin with an underscore.
_JOB = "_job.json"
_PLAN = "_plan"
_REPORT = "_report.json"

_PREFIX, _SUFFIX = "part-", ".parquet"


class OtherJobError(Exception):
    """The folder contains another job's results; `str(error)` lists the differences."""


@dataclass(frozen=True)
class Job:
    """The parameters that determine the results; sent to each node and stored in `_job.json`.

    The fields' names are the keys in `_job.json`: renaming one would make existing folders
    unreadable.

    Attributes:
        archive_sha256: SHA-256 of the archive.
        images: the address of the images, as given by the user.
        column: the column of Parquet files with images or addresses; None without Parquet files.
        base: the folder for relative paths.
        topk: number of predictions; None for the archive's default.
        threshold: confidence threshold; None for the archive's default.
        embedding: include the embedding in each row.
        output: the address of the folder of results, absolute.
        pictures: number of images.
        part_size: images per part; the last part may have fewer.
        version: version of the columns of the results.
    """

    archive_sha256: str
    images: str
    column: str | None
    base: str
    topk: int | None
    threshold: float | None
    embedding: bool
    output: str
    pictures: int = 0
    part_size: int = 0
    version: int = schema.VERSION

    @property
    def folder(self) -> Place:
        """Return the folder of the results."""
        return storage.place(self.output)

    @property
    def plan_address(self) -> str:
        """Return the address of the folder of the plan."""
        base, question, query = self.output.partition("?")
        return f"{base.rstrip('/')}/{_PLAN}{question}{query}"

    @property
    def query(self) -> str:
        """Return the options of the images' file system, see `storage.within`."""
        is_local = storage.place(self.images).is_local
        return "" if is_local else "".join(self.images.partition("?")[1:])

    def part_file(self, number: int) -> Place:
        """Return the result file of a part."""
        return self.folder / f"{_PREFIX}{number:08}{_SUFFIX}"

    def missing(self) -> list[int]:
        """Return the numbers of the parts without results."""
        existing = storage.names(self.folder)
        every = range(-(-self.pictures // self.part_size))
        return [number for number in every if self.part_file(number).name not in existing]

    def size(self, number: int) -> int:
        """Return the number of images of a part."""
        return min(self.part_size, self.pictures - number * self.part_size)

    def begin(self) -> None:
        """Write `_job.json`, which marks the plan as complete."""
        self._write_json(_JOB, asdict(self))

    def write_report(self, report: dict[str, Any]) -> None:
        """Write a report to the folder of the results."""
        self._write_json(_REPORT, report)

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        storage.write(self.folder / name, (json.dumps(values, indent=2) + "\n").encode())


def load_existing_job(requested: Job) -> Job | None:
    """Read the job of a folder to resume it; return None if there is none.

    Args:
        requested: the job of the command line; its plan is ignored.

    Raises:
        OtherJobError: the folder contains another job's results, or other files.
    """
    existing = storage.names(requested.folder) - {_PLAN}
    if _JOB not in existing:
        if existing:
            raise OtherJobError(
                f"{requested.output} has other files, such as {min(existing)}, and no job of this "
                "command's. Name an empty folder, or one that is not there."
            )
        return None
    stored = json.loads(storage.read(requested.folder / _JOB, parts.MAX_FILE_BYTES))
    # Version 1 stored no version.
    found = Job(**{"version": 1} | stored)
    here = _identity(requested)
    differences = [
        f"{name} {there!r} there, {here[name]!r} here"
        for name, there in _identity(found).items()
        if there != here[name]
    ]
    if differences:
        raise OtherJobError(
            f"{requested.output} has the results of another job: {'; '.join(differences)}. "
            "Results are never mixed: name another folder, or remove this one."
        )
    return found


def _identity(job: Job) -> dict[str, Any]:
    """Return what must be equal to resume a job, by name."""
    if storage.place(job.images).is_local:  # independent of the current folder
        images = os.path.normpath(os.path.join(job.base, job.images))  # noqa: PTH118  # text
    else:
        images = job.images.partition("?")[0]
    return {
        "archive": job.archive_sha256,
        "column": job.column,
        "topk": job.topk,
        "threshold": job.threshold,
        "embedding": job.embedding,
        "version of the columns": job.version,
        "images": images,
    }
