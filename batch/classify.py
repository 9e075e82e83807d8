"""Run a job of `make classify-batch`: plan, connect to Ray, classify, report."""

from batch import cluster  # noqa: I001  # sets variables before Ray is imported

import contextlib
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batch import parts, pipeline, plan, storage
from batch.archive import Archive, load_handler_from, unpack
from batch.job import Job, OtherJobError, load_existing_job
from batch.pipeline import Actors, Tally
from batch.storage import AddressError
from classification_client.errors import TransientError
from scripts.terminal import UserError, console, step, warn

# Number of the most frequent errors to print and report.
_MAX_ERRORS = 10


def classify(
    source: str,
    output: str,
    archive: Path,
    column: str | None,
    choices: dict[str, Any],
    actors: int | None,
    address: str | None,
) -> None:
    """Classify the images of a source; the parameters are the command's options.

    Raises:
        UserError: of what a user can fix.
    """
    with errors_as_messages():
        content, sha256, description = _load(archive, choices)
        place = storage.place(output)
        absolute = place.path if place.is_local else output
        requested = Job(sha256, source, column, os.getcwd(), **choices, output=absolute)  # noqa: PTH109
        job = load_existing_job(requested) or _begin(requested)
        missing = job.missing()
        if not missing:
            step(f"All {job.pictures:,} images have results in {output}")
            return
        if description.warning:
            warn(description.warning)
        with cluster.connected(address) if address else cluster.embedded() as root:
            shared = Archive(sha256, ray.put(content), root)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            models = Actors.of(resources, actors, len(missing), gpu=description.wants_gpu)
            step(
                f"Classifying {job.pictures:,} images, {len(missing):,} part(s), with "
                f"{models.count} actor(s) on {int(resources.get('CPU', 0))} CPU(s)"
                + (f" and {int(resources['GPU'])} GPU(s)" if models.on_gpus else "")
            )
            started = time.monotonic()
            tally = _show_progress(pipeline.run(job, shared, missing, models), job, missing)
            seconds = time.monotonic() - started
    _report(job, tally, seconds, output)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn errors that a user can fix into a `UserError`."""
    try:
        yield
    except (OtherJobError, plan.PlanError, AddressError) as error:
        raise UserError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise UserError(_root_cause(error)) from error
    except ConnectionError as error:
        raise UserError(f"No Ray cluster answers: {error}") from error
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{file}{error.strerror or error}.") from error


def _root_cause(error: BaseException) -> str:
    """Return the message for the root cause of an error that stopped the job."""
    cause: BaseException = error
    while (below := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = below
    if isinstance(cause, TransientError):
        reason = f"The storage does not answer: {cause.strerror or cause}."
    else:
        reason = f"The job stopped: {type(cause).__name__}: {cause}"
    return f"{reason} The same command resumes where it stopped."


def _load(archive: Path, choices: dict[str, Any]) -> tuple[bytes, str, Any]:
    """Load an archive's handler; return its bytes, SHA-256 and `batch.stages.Description`."""
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
        load_handler_from(folder)
        try:
            from batch import stages  # imports the archive's handler

            return content, sha256, stages.describe(folder, stages.Choices(**choices))
        except Exception as error:  # the archive's handler has its own error classes
            raise UserError(f"The archive: {error}") from error


def _begin(requested: Job) -> Job:
    """Write the plan and the description of a new job."""
    left_out: Counter[str] = Counter()
    with console.status("Listing the images ..."):
        found = plan.entries(requested.images, requested.column, left_out)
        count, part_size = parts.write(found, requested.plan_address)
    if left_out:
        step("Left out: " + ", ".join(f"{count} {what}" for what, count in left_out.most_common(5)))
    job = replace(requested, pictures=count, part_size=part_size)
    job.begin()
    return job


def _show_progress(tallies: Iterator[Tally], job: Job, missing: Sequence[int]) -> Tally:
    """Show a progress bar until all parts are done; return the sum of their counts."""
    total = Tally()
    done = job.pictures - sum(map(job.size, missing))
    if done:
        step(f"{done:,} images have results already")
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    started = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=job.pictures, completed=done, rate="")
        for tally in tallies:
            total.add(tally)
            rate = f"{total.read / (time.monotonic() - started):.1f} images/s"
            progress.update(task, completed=done + total.read, rate=rate)
    return total


def _report(job: Job, tally: Tally, seconds: float, output: str) -> None:
    """Print the counts, and write them to the job's report."""
    errors = tally.errors.most_common(_MAX_ERRORS)
    for error, count in errors:
        console.print(f"{count:8,} x {error}", markup=False, highlight=False)
    for reason, count in tally.fallbacks.most_common():
        warn(f"{count:,} images are answered in float32, not the archive's precision: {reason}")
    # Users' programs read the keys, so they must not be renamed.
    counts = {
        "read": tally.read,
        "classified": tally.classified,
        "refused": tally.rejected,
        "seconds": round(seconds, 1),
        "pictures_per_second": round(tally.read / seconds, 1),
    }
    job.write_report(
        {**counts, "errors": dict(errors), "fallbacks": tally.fallbacks, "job": asdict(job)}
    )
    step(f"Results: {output}")
    console.print(
        f"{tally.read:,} read, {tally.classified:,} classified, {tally.rejected:,} rejected, "
        f"{seconds:.1f} s, {counts['pictures_per_second']} images/s"
    )
