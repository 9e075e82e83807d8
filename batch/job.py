"""What a job is, and the folder that it writes to: the same there means that it goes on."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from batch import parts, schema, storage
from batch.storage import Place

# Names that begin with _ are left out by what reads folders of Parquet files.
_JOB = "_job.json"
_PLAN = "_plan"
_REPORT = "_report.json"

_PREFIX, _SUFFIX = "part-", ".parquet"


class OtherJobError(Exception):
    """The folder has the results of another job; `str(error)` says what differs."""


@dataclass(frozen=True)
class Job:
    """What the results depend on; it travels to every node.

    Attributes:
        archive_sha256: of the archive.
        images: the address of the pictures, as a person gave it.
        column: of Parquet files with pictures or their addresses; None where there are none.
        base: the folder that relative paths begin in.
        topk: predictions wanted; None for the archive's.
        threshold: least probability that counts as recognised; None for the archive's.
        embedding: each row holds the pooled last features too.
        output: the address of the folder of results, absolute.
        pictures: how many there are.
        part_size: how many of them a part has, but for the last.
        version: of the columns of the results.
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
        """Of the results."""
        return storage.place(self.output)

    @property
    def plan(self) -> Place:
        """The folder of the plan."""
        return storage.place(self.plan_address)

    @property
    def plan_address(self) -> str:
        """The same as an address."""
        base, question, query = self.output.partition("?")
        return f"{base.rstrip('/')}/{_PLAN}{question}{query}"

    @property
    def query(self) -> str:
        """What the pictures' file system is to be told, see `storage.within`."""
        is_local = storage.place(self.images).is_local
        return "" if is_local else "".join(self.images.partition("?")[1:])

    def part_file(self, number: int) -> Place:
        """Where a part's results go."""
        return self.folder / f"{_PREFIX}{number:08}{_SUFFIX}"

    def missing(self) -> list[int]:
        """The parts that have no results."""
        there = storage.names(self.folder)
        every = range(-(-self.pictures // self.part_size))
        return [number for number in every if self.part_file(number).name not in there]

    def size(self, number: int) -> int:
        """How many pictures a part has."""
        return min(self.part_size, self.pictures - number * self.part_size)

    def write_report(self, report: dict[str, Any]) -> None:
        """Keeps a report beside the results."""
        storage.write(self.folder / _REPORT, _as_json(report))

    def begin(self) -> None:
        """Says in the folder what its results are of; the plan is there already."""
        storage.write(self.folder / _JOB, _as_json(asdict(self)))


def begun(asked: Job) -> Job | None:
    """The job that the folder holds; None for an empty one, or one that was never begun.

    Args:
        asked: what a person wants now; what its plan says does not count.

    Raises:
        OtherJobError: the folder has another job's results, or somebody else's files.
    """
    folder = asked.folder
    there = storage.names(folder) - {_PLAN}
    if _JOB not in there:
        if there:
            raise OtherJobError(
                f"{asked.output} has other files, such as {min(there)}, and no job of this "
                "command's. Name an empty folder, or one that is not there."
            )
        return None
    said = json.loads(storage.read(folder / _JOB, parts.MOST_BYTES))
    # The first version did not say which it was.
    found = Job(**{"version": 1} | said)
    differing = [
        f"{name} {getattr(found, field)!r} there, {getattr(asked, field)!r} here"
        for field, name in _NAMES.items()
        if getattr(found, field) != getattr(asked, field)
    ]
    if _place(found) != _place(asked):
        differing.append(f"pictures {_place(found)!r} there, {_place(asked)!r} here")
    if differing:
        raise OtherJobError(
            f"{asked.output} has the results of another job: {'; '.join(differing)}. "
            "Results are never mixed: name another folder, or remove this one."
        )
    return found


_NAMES = {
    "archive_sha256": "archive",
    "column": "column",
    "topk": "topk",
    "threshold": "threshold",
    "embedding": "embedding",
    "version": "version of the columns",
}


def _place(job: Job) -> str:
    """Which pictures, wherever the command is given."""
    if storage.place(job.images).is_local:
        return os.path.normpath(os.path.join(job.base, job.images))  # noqa: PTH118  # text
    return job.images.partition("?")[0]


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
