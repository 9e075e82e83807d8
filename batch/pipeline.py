"""The job on Ray Data: read and decode in tasks, the model in actors, a file for each part.

Encoded bytes stay in the task that reads them, which decodes one picture while it reads the next
few: 256 photographs of a telephone would be more than a gigabyte between two tasks.

Whatever dies is started again by Ray, and makes the same part again. Results are the same then, and
so is their file's name, so that no picture is lost, and none is there twice. Where a part's task
dies each time, what is left of the job is decoded in processes apart, so that a picture that
crashes its decoder is a row like others that fail.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import pyarrow as pa
import ray
from pyarrow import compute
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from batch import parts, schema, storage
from batch.archive import Archive
from batch.job import Job

# Of a CPU: an actor and a decoding task together take one, so that each CPU has one of both, and
# whichever has more to do gets it.
_ACTOR_CPUS = 0.6
_TASK_CPUS = 0.4
# An actor on a GPU has little to do on a CPU, and decoding takes what is left, at most a whole one.
_GPU_ACTOR_CPUS = 0.1

# A task that died so often did not die of its node: a picture ends it.
_RETRIES = 3

# Types of errors that the handler does not have: a file that cannot be read, and its like of a
# server's own fault.
_UNREADABLE = "Unreadable"
_INTERNAL = "InternalError"

_DIGITS = re.compile(r"\d[\d,.]*")


@dataclass
class Tally:
    """What became of pictures.

    Attributes:
        classified: how many have labels.
        refused: how many have an error.
        errors: how often each occurs; numbers in their messages are left out.
        fallbacks: how many were not answered in the archive's precision, by the reason.
    """

    classified: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """All of them."""
        return self.classified + self.refused

    def add(self, other: "Tally") -> None:
        """Counts another's too."""
        self.classified += other.classified
        self.refused += other.refused
        self.errors += other.errors
        self.fallbacks += other.fallbacks


@dataclass(frozen=True)
class Actors:
    """The processes that load the model.

    Attributes:
        count: how many.
        on_gpus: each has a GPU of its own.
        cpus: that each is given, which leaves enough for decoding.
        task_cpus: that each task that decodes is given.
    """

    count: int
    on_gpus: bool
    cpus: float
    task_cpus: float

    @classmethod
    def of(
        cls, resources: Mapping[str, float], wanted: int | None, parts: int, *, gpu: bool
    ) -> "Actors":
        """As many as a cluster has GPUs, where the model uses them, or CPUs; at most one a part.

        Args:
            resources: of the cluster, as Ray counts them.
            wanted: how many a person asked for, if any.
            parts: that are to be made.
            gpu: the model runs on GPUs where there are some.
        """
        cpus = max(1, int(resources.get("CPU", 1)))
        gpus = int(resources.get("GPU", 0)) if gpu else 0
        count = min(wanted or gpus or cpus, parts)
        each = cpus / count
        if gpus == 0:
            own = _ACTOR_CPUS * min(1, each)
            return cls(count, on_gpus=False, cpus=own, task_cpus=_TASK_CPUS)
        own = _GPU_ACTOR_CPUS * min(1, each)
        # A node with a CPU for each GPU, and no more, must have room for a task beside its actors.
        return cls(count, on_gpus=True, cpus=own, task_cpus=min(1, each - own))


def run(job: Job, archive: Archive, numbers: list[int], actors: Actors) -> Iterator[Tally]:
    """Makes parts, and tells what became of each as it is done.

    Args:
        job: the job.
        archive: the same for all nodes.
        numbers: of the parts that are to be made.
        actors: the processes that load the model.

    Raises:
        ray.exceptions.RayError: a part cannot be made; its cause says why.
    """
    left = set(numbers)
    try:
        for number, tally in _made(job, archive, numbers, actors, isolated=False):
            left.remove(number)
            yield tally
    except ray.exceptions.WorkerCrashedError:
        for _, tally in _made(job, archive, sorted(left), actors, isolated=True):
            yield tally


def _made(
    job: Job, archive: Archive, numbers: list[int], actors: Actors, *, isolated: bool
) -> Iterator[tuple[int, Tally]]:
    """The parts' numbers, in any order, and what became of each; see `decode` for `isolated`."""
    # The only way to say how often a task is tried; Ray's own that replaces it is not there yet.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A block is a part, and stays one.
    context.target_max_block_size = None
    # None is as a person asked for, however long a cluster takes to start it.
    context.wait_for_min_actors_s = -1
    items = [{schema.PART: number} for number in numbers]
    numbered: Any = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = numbered.map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"job": job, "archive": archive, "isolated": isolated},
        num_cpus=actors.task_cpus,
        # Ray Data by itself tries without end.
        ray_remote_args_fn=None if isolated else lambda: {"max_retries": _RETRIES},
    ).map_batches(
        Model,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"job": job, "archive": archive, "on_gpu": actors.on_gpus},
        # One part is written while the next is classified.
        compute=ActorPoolStrategy(
            size=min(actors.count, len(numbers)),
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        num_cpus=actors.cpus,
        # With `num_gpus` Ray Data insists on a size of batches; a batch is a whole part here.
        ray_remote_args_fn=(lambda: {"num_gpus": 1}) if actors.on_gpus else None,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in block.to_pylist():
            counters = (Counter(json.loads(row[name])) for name in ("errors", "fallbacks"))
            yield row[schema.PART], Tally(row["classified"], row["refused"], *counters)


def decode(number: Any, *, job: Job, archive: Archive, isolated: bool) -> Any:
    """A part's pictures as the model takes them.

    Args:
        number: a table of one row.
        job: the job.
        archive: the archive.
        isolated: a picture that crashes its decoder must not end this process.

    Returns:
        a table of `schema.decoded`.

    Raises:
        AwayError: none of them can be read now.
    """
    (part,) = number.column(schema.PART).to_pylist()
    stages = archive.stages()
    decoder = _decoder(archive)
    rows = parts.part(job.plan_address, part, job.part_size)
    paths = rows.column("path").to_pylist()
    pixels: list[bytes | None] = []
    errors: list[tuple[str, str] | tuple[None, None]] = []
    away: list[OSError] = []
    read = parts.contents(rows, job.column, job.base, job.query, stages.MAX_REQUEST_BYTES)
    for content in read:
        made: bytes | None = None
        error: tuple[str, str] | tuple[None, None] = (None, None)
        if isinstance(content, OSError):
            error = (_UNREADABLE, f"The file cannot be read: {content.strerror or content}.")
            if isinstance(content, storage.AwayError):
                away.append(content)
        else:
            try:
                made = decoder.pixels(content, isolated=isolated)
            except stages.RequestError as rejection:
                error = (rejection.type, str(rejection))
            except Exception as failure:  # whatever it is, it is this image's row
                error = _internal(f"{type(failure).__name__}: {failure}")
        pixels.append(made)
        errors.append(error)
    if len(away) == len(paths):
        raise storage.AwayError(f"no picture of a part can be read: {away[0]}")
    types, messages = zip(*errors, strict=True)
    columns = [[part] * len(paths), paths, pixels, types, messages]
    return pa.table(dict(zip(schema.decoded().names, columns, strict=True)), schema.decoded())


def _internal(detail: str) -> tuple[str, str]:
    """Return the error's type and message if the server would return 500."""
    return _INTERNAL, f"The image failed: {detail}"


@lru_cache(maxsize=1)
def _decoder(archive: Archive) -> Any:
    return archive.stages().Decoder(archive.folder())


class Model:
    """An actor: loads the model once, then answers part after part, and writes their files."""

    def __init__(self, *, job: Job, archive: Archive, on_gpu: bool) -> None:
        stages = archive.stages()
        choices = stages.Choices(job.topk, job.threshold, job.embedding)
        # Ray shows a process the GPUs that are its own, from 0 on.
        self._classifier = stages.Classifier(archive.folder(), choices, gpu=0 if on_gpu else None)
        description = stages.describe(archive.folder(), choices)
        self._schema = schema.results(multilabel=description.multilabel, embedding=job.embedding)
        self._same = {
            "warning": description.warning,
            schema.PRECISION: self._classifier.precision,
            schema.ARCHIVE: job.archive_sha256,
        }
        self._job = job
        self._one_at_a_time = Lock()

    def __call__(self, pictures: Any) -> Any:
        """Classifies a part, and writes its file.

        Args:
            pictures: a table of `schema.decoded`.

        Returns:
            a table of one row: the part's number, and what is in the file.

        Raises:
            AwayError: the file cannot be written now.
        """
        (part,) = set(pictures.column(schema.PART).to_pylist())
        with self._one_at_a_time:
            results = self._results(pictures.drop_columns([schema.PART]))
        storage.write_table(self._job.part_file(part), results)
        failed = results.filter(compute.is_valid(results.column("error_type")))
        errors = Counter(
            f"{kind}: {_DIGITS.sub('N', message)}"
            for kind, message in zip(*_lists(failed, "error_type", "error_message"), strict=True)
        )
        reason = self._classifier.fallback
        return pa.table(
            {
                schema.PART: [part],
                "classified": [len(results) - len(failed)],
                "refused": [len(failed)],
                "errors": [json.dumps(errors)],
                "fallbacks": [json.dumps({reason: len(results)} if reason else {})],
            }
        )

    def _results(self, pictures: Any) -> Any:
        sound = pictures.column(schema.PIXELS).drop_null()
        results = self._classifier.results([value.as_buffer() for value in sound])
        rows = []
        for row in pictures.drop_columns([schema.PIXELS]).to_pylist():
            found = {} if row["error_type"] else _columns(next(results))
            rows.append(row | found | self._same)
        return pa.Table.from_pylist(rows, self._schema)


def _columns(result: Any) -> dict[str, Any]:
    """Return a result, or an error of the handler, as columns."""
    if isinstance(result, Exception):
        kind, message = _internal(getattr(result, "detail", str(result)))
        return {"error_type": kind, "error_message": message}
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


def _lists(table: Any, *names: str) -> Iterable[list[Any]]:
    return (table.column(name).to_pylist() for name in names)
