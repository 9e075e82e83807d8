"""`make classify-batch` and `python -m batch`: the command line."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batch import cluster, pipeline, plan, storage
from batch.archive import Archive, enter, unpack
from batch.job import Job, OtherJobError, begun
from batch.pipeline import Actors, Tally
from batch.storage import AddressError, AwayError
from scripts.sources import sources
from scripts.terminal import UserError, console, step, warn

_ARCHIVE = Path("model_store", "densenet121.mar")
_COMMONEST = 10


def main(
    pictures: Annotated[
        list[str] | None,
        typer.Argument(
            help="A folder, a list of addresses (.txt), a Parquet file or a folder of such; on "
            "this machine, or s3://..., gs://..."
        ),
    ] = None,
    images: Annotated[str | None, typer.Option(help="The same, as one name.")] = None,
    output: Annotated[str, typer.Option(help="A folder for the results; the same goes on.")] = "",
    archive: Annotated[Path, typer.Option(help="The .mar.")] = _ARCHIVE,
    column: Annotated[
        str | None, typer.Option(help="Of Parquet: with addresses, or with pictures' bytes.")
    ] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Predictions a picture.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least probability of a label.")
    ] = None,
    embedding: Annotated[bool, typer.Option(help="The pooled last features too.")] = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Processes with the model; otherwise one a CPU.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster's head; otherwise this machine alone.")
    ] = None,
) -> int:
    """Classifies any number of pictures on all cores of this machine, or on a Ray cluster."""
    named = pictures or sources(images)
    if len(named) != 1:
        raise UserError("Name one folder, list or Parquet file: IMAGES=pictures.")
    if not output:
        raise UserError("Name a folder for the results: OUTPUT=results.")
    with _explained(), _unpacked(archive) as (content, sha256, folder):
        choices = {"topk": topk, "threshold": threshold, "embedding": embedding}
        description = _described(folder, choices)
        asked = Job(sha256, named[0], column, os.getcwd(), **choices, output=_absolute(output))  # type: ignore[arg-type]  # noqa: PTH109
        job = begun(asked) or _planned(asked)
        missing = job.missing()
        if not missing:
            step(f"All {job.pictures:,} pictures have results in {output}")
            return 0
        if description.warning:
            warn(description.warning)
        with _ray(address) as root:
            shared = Archive(sha256, ray.put(content), root)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            models = Actors.of(resources, actors, len(missing), gpu=description.wants_gpu)
            step(
                f"Classifying {job.pictures:,} pictures, {len(missing):,} part(s), with "
                f"{models.count} actor(s) on {int(resources.get('CPU', 0))} CPU(s)"
                + (f" and {int(resources['GPU'])} GPU(s)" if models.on_gpus else "")
            )
            started = time.monotonic()
            tally = _follow(pipeline.run(job, shared, missing, models), job, missing)
            seconds = time.monotonic() - started
    _report(job, tally, seconds, output)
    return 0


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What a person can mend, as a sentence."""
    try:
        yield
    except (OtherJobError, plan.PlanError, AddressError) as error:
        raise UserError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise UserError(_why(error)) from error
    except ConnectionError as error:
        raise UserError(f"No Ray cluster answers: {error}") from error
    except OSError as error:
        raise UserError(f"{_subject(error)}{error.strerror or error}.") from error


def _subject(error: OSError) -> str:
    return f"{error.filename}: " if error.filename else ""


def _why(error: BaseException) -> str:
    """What stopped the job; what was done is there."""
    cause: BaseException = error
    while (below := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = below
    if isinstance(cause, AwayError):
        said = f"The storage does not answer: {cause.strerror or cause}."
    else:
        said = f"The job stopped: {type(cause).__name__}: {cause}"
    return f"{said} The same command goes on where it stopped."


@contextlib.contextmanager
def _unpacked(archive: Path) -> Iterator[tuple[bytes, str, Path]]:
    """An archive's bytes, hash and parts; from here on its handler is this process's."""
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise UserError(
            f"{archive} cannot be read: {error.strerror}. `make archive` builds it; ARCHIVE names "
            "another."
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "archive")
        try:
            unpack(content, sha256, folder)
        except Exception as error:
            raise UserError(f"{archive} is no sound archive: {error}.") from error
        enter(folder)
        yield content, sha256, folder


def _described(folder: Path, choices: dict[str, Any]) -> Any:
    from batch import stages  # imports the archive's handler

    try:
        return stages.describe(folder, stages.Choices(**choices))
    except Exception as error:  # of the archive's own kinds
        raise UserError(f"The archive: {error}") from error


def _absolute(output: str) -> str:
    where = storage.place(output)
    return where.path if where.is_local else output


def _planned(asked: Job) -> Job:
    """Writes down which pictures there are, and begins the job."""
    left_out: Counter[str] = Counter()
    with console.status("Listing the pictures ..."):
        found = plan.entries(asked.images, asked.column, left_out)
        pictures, part_size = plan.write(found, asked.plan)
    if left_out:
        step("Left out: " + ", ".join(f"{count} {what}" for what, count in left_out.most_common(5)))
    job = replace(asked, pictures=pictures, part_size=part_size)
    job.begin()
    return job


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[str | None]:
    if address is None:
        step("Starting Ray on this machine")
        with cluster.embedded() as root:
            yield root
    else:
        with cluster.joined(address):
            yield None


def _follow(tallies: Iterator[Tally], job: Job, missing: Sequence[int]) -> Tally:
    """Shows how far it is."""
    total = Tally()
    done = job.pictures - sum(map(job.size, missing))
    if done:
        step(f"{done:,} pictures have results already")
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    started = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=job.pictures, completed=done, rate="")
        for tally in tallies:
            total.add(tally)
            rate = f"{total.read / (time.monotonic() - started):.1f} pictures/s"
            progress.update(task, completed=done + total.read, rate=rate)
    return total


def _report(job: Job, tally: Tally, seconds: float, output: str) -> None:
    commonest = tally.errors.most_common(_COMMONEST)
    for error, count in commonest:
        console.print(f"{count:8,} x {error}", markup=False, highlight=False)
    for reason, count in tally.fallbacks.most_common():
        warn(f"{count:,} pictures are answered in float32, not the archive's precision: {reason}")
    counts = {
        "read": tally.read,
        "classified": tally.classified,
        "refused": tally.refused,
        "seconds": round(seconds, 1),
        "pictures_per_second": round(tally.read / seconds, 1),
    }
    job.write_report(
        {**counts, "errors": dict(commonest), "fallbacks": tally.fallbacks, "job": asdict(job)}
    )
    step(f"Results: {output}")
    console.print(
        f"{tally.read:,} read, {tally.classified:,} classified, {tally.refused:,} refused, "
        f"{seconds:.1f} s, {counts['pictures_per_second']} pictures/s"
    )
