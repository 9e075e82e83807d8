"""Run the job on Ray Data: tasks read and decode, actors classify and write one file per part.

A task reads and decodes, so that encoded bytes are not passed between tasks: 256 smartphone
photographs would be more than a gigabyte. It decodes one image while it reads the next ones.

Ray restarts a task or an actor that crashes, and repeats its part with the same results and file
name, so no image is lost or duplicated. If a part crashes its task each time, the remaining parts
are decoded in separate decoder processes, so that an image that crashes its decoder gets an error
in its row.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from batch import parts, schema, storage
from batch.archive import Archive
from batch.job import Job
from classification_client.errors import TransientError

# Shares of a CPU. Each CPU runs one actor and one decoding task; the operating system gives more
# time to the one with more work.
_ACTOR_CPUS = 0.6
_TASK_CPUS = 0.4
# An actor on a GPU needs little CPU time; decoding tasks get the rest, at most one CPU each.
_GPU_ACTOR_CPUS = 0.1

# A task that still crashes after this many retries crashes because of an image, not of its node.
_MAX_RETRIES = 3

# Error types that the handler does not have: an unreadable file, and an error for which the server
# would return status 500.
_UNREADABLE = "Unreadable"
_INTERNAL = "InternalError"

_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass
class Tally:
    """Counts of images by outcome.

    Attributes:
        classified: number of images with a result.
        rejected: number of images with an error.
        errors: count of each error; numbers in the messages are replaced by N.
        fallbacks: number of images not classified in the archive's precision, by reason.
    """

    classified: int = 0
    rejected: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """Return the number of all images."""
        return self.classified + self.rejected

    def add(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        self.classified += other.classified
        self.rejected += other.rejected
        self.errors += other.errors
        self.fallbacks += other.fallbacks


@dataclass(frozen=True)
class Actors:
    """The processes that load the model.

    Attributes:
        count: number of actors.
        on_gpus: whether each actor has its own GPU.
        cpus: CPUs per actor; the rest is for decoding.
        task_cpus: CPUs per decoding task.
    """

    count: int
    on_gpus: bool
    cpus: float
    task_cpus: float

    @classmethod
    def of(
        cls, resources: Mapping[str, float], wanted: int | None, parts: int, *, gpu: bool
    ) -> "Actors":
        """Return one actor per GPU if the model uses GPUs, else one per CPU; at most one per part.

        `resources` are the cluster's, as Ray reports them; `wanted` overrides the number of actors.
        """
        cpus = max(1, int(resources.get("CPU", 1)))
        gpus = int(resources.get("GPU", 0)) if gpu else 0
        count = min(wanted or gpus or cpus, parts)
        each = cpus / count
        own = (_GPU_ACTOR_CPUS if gpus else _ACTOR_CPUS) * min(1, each)
        # A node with as many CPUs as GPUs must have room for a task in addition to its actors.
        return cls(count, gpus > 0, own, min(1, each - own) if gpus else _TASK_CPUS)


def run(job: Job, archive: Archive, numbers: list[int], actors: Actors) -> Iterator[Tally]:
    """Run the parts `numbers` of a job; yield each part's counts when it is done.

    Raises:
        ray.exceptions.RayError: a part failed; the reason is the error's cause.
    """
    left = set(numbers)
    try:
        for number, tally in _run_parts(job, archive, numbers, actors, isolated=False):
            left.remove(number)
            yield tally
    except ray.exceptions.WorkerCrashedError:
        for _, tally in _run_parts(job, archive, sorted(left), actors, isolated=True):
            yield tally


def _run_parts(
    job: Job, archive: Archive, numbers: list[int], actors: Actors, *, isolated: bool
) -> Iterator[tuple[int, Tally]]:
    """Yield each part's number and its counts, in the order of completion.

    With `isolated`, images are decoded in a separate decoder process, see `decode`.
    """
    # `ray_remote_args_fn` is deprecated, but Ray has no other way yet to set `max_retries`.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # No limit: Ray never splits the block of a part.
    context.target_max_block_size = None
    # A negative value disables waiting for all actors at the start, and its timeout.
    context.wait_for_min_actors_s = -1
    items = [{schema.PART: number} for number in numbers]
    numbered: Any = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = numbered.map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"job": job, "archive": archive, "isolated": isolated},
        num_cpus=actors.task_cpus,
        # By default Ray Data retries without a limit.
        ray_remote_args_fn=None if isolated else lambda: {"max_retries": _MAX_RETRIES},
    ).map_batches(
        Model,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"job": job, "archive": archive, "on_gpu": actors.on_gpus},
        # Two calls at a time: one part is written while the next is classified.
        compute=ActorPoolStrategy(
            size=min(actors.count, len(numbers)),
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        num_cpus=actors.cpus,
        # The parameter `num_gpus` would require a batch size, but here a batch is a whole part.
        ray_remote_args_fn=(lambda: {"num_gpus": 1}) if actors.on_gpus else None,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in block.to_pylist():
            counters = (Counter(json.loads(row[name])) for name in ("errors", "fallbacks"))
            yield row[schema.PART], Tally(row["classified"], row["rejected"], *counters)


def decode(number: Any, *, job: Job, archive: Archive, isolated: bool) -> Any:
    """Decode a part's images to the model's input, a table of `schema.decoded`.

    Args:
        number: a table of one row, with the part's number.
        job: the job.
        archive: the archive.
        isolated: decode in a separate decoder process, which an image may crash.

    Raises:
        TransientError: reading failed with a transient error for all images.
    """
    (part,) = number.column(schema.PART).to_pylist()
    decoder, max_bytes = _decoder(archive), archive.stages().MAX_REQUEST_BYTES
    images = parts.part(job.plan_address, part, job.part_size)
    contents = parts.contents(images, job.column, job.base, job.query, max_bytes)
    rows, transient = [], []
    for image, content in zip(images, contents, strict=True):
        if isinstance(content, TransientError):
            transient.append(content)
        columns = _decode_one(content, decoder, isolated=isolated)
        rows.append({schema.PART: part, "path": image.path} | columns)
    if len(transient) == len(rows):
        raise TransientError(transient[0].errno, f"no image of a part can be read: {transient[0]}")
    return pa.Table.from_pylist(rows, schema.decoded())


@lru_cache(maxsize=1)
def _decoder(archive: Archive) -> Any:
    return archive.stages().Decoder(archive.folder())


def _decode_one(content: bytes | OSError, decoder: Any, *, isolated: bool) -> dict[str, Any]:
    """Return the column of an image's pixels, or those of its error."""
    if isinstance(content, OSError):
        return _error(_UNREADABLE, f"The file cannot be read: {content.strerror or content}.")
    try:
        return {schema.PIXELS: decoder.pixels(content, isolated=isolated)}
    except Exception as error:  # any error is stored in the image's row
        # The handler's errors for rejected images have a type.
        kind = getattr(error, "type", None)
        return _error(kind, str(error)) if kind else _internal(f"{type(error).__name__}: {error}")


def _internal(detail: str) -> dict[str, Any]:
    """Return the columns of an error for which the server would return status 500."""
    return _error(_INTERNAL, f"The image failed: {detail}")


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error_type": kind, "error_message": message}


class Model:
    """An actor that loads the model once, classifies parts and writes their files."""

    def __init__(self, *, job: Job, archive: Archive, on_gpu: bool) -> None:
        stages = archive.stages()
        choices = stages.Choices(job.topk, job.threshold, job.embedding)
        # Ray sets CUDA_VISIBLE_DEVICES to the actor's own GPUs, so their numbers begin at 0.
        self._classifier = stages.Classifier(archive.folder(), choices, gpu=0 if on_gpu else None)
        description = stages.describe(archive.folder(), choices)
        self._schema = schema.results(multilabel=description.multilabel, embedding=job.embedding)
        self._constant = {
            "warning": description.warning,
            schema.PRECISION: self._classifier.precision,
            schema.ARCHIVE: job.archive_sha256,
        }
        self._job = job
        self._lock = Lock()

    def __call__(self, images: Any) -> Any:
        """Classify a part, write its file, and return a table with its number and counts.

        Args:
            images: a table of `schema.decoded`.

        Raises:
            OSError: all attempts to write the file failed.
        """
        (part,) = set(images.column(schema.PART).to_pylist())
        with self._lock:
            rows = self._rows(images.drop_columns([schema.PART]))
        storage.write_table(self._job.part_file(part), pa.Table.from_pylist(rows, self._schema))
        failed = [row for row in rows if row["error_type"]]
        errors = Counter(
            f"{row['error_type']}: {_NUMBER.sub('N', row['error_message'])}" for row in failed
        )
        reason = self._classifier.fallback
        return pa.table(
            {
                schema.PART: [part],
                "classified": [len(rows) - len(failed)],
                "rejected": [len(failed)],
                "errors": [json.dumps(errors)],
                "fallbacks": [json.dumps({reason: len(rows)} if reason else {})],
            }
        )

    def _rows(self, images: Any) -> list[dict[str, Any]]:
        decoded = images.column(schema.PIXELS).drop_null()
        results = self._classifier.results([value.as_buffer() for value in decoded])
        return [
            row | ({} if row["error_type"] else _columns(next(results))) | self._constant
            for row in images.drop_columns([schema.PIXELS]).to_pylist()
        ]


def _columns(result: Any) -> dict[str, Any]:
    """Return the columns of a result or an error of the handler."""
    if isinstance(result, Exception):
        return _internal(getattr(result, "detail", str(result)))
    predictions = result["predictions"]
    found = {
        "labels": [prediction["label"] for prediction in predictions],
        "class_ids": [prediction["class_id"] for prediction in predictions],
        "probabilities": [prediction["probability"] for prediction in predictions],
        "recognized": result["recognized"],
    }
    if "labels" in result:
        found["passing"] = [label["label"] for label in result["labels"]]
    if "embedding" in result:
        found["embedding"] = result["embedding"]
    return found
