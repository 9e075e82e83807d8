"""A flood of the largest uploads, and the costliest pictures among them: `make flood`.

The server has the memory of a pod of the Kubernetes deployment, where such a limit can be set.
"""

import resource
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import typer
from PIL import Image

from benchmarks.machine import write_report
from benchmarks.memory_limit import MemoryGroup, memory_group, pod_limit
from benchmarks.pictures import costly, encode
from benchmarks.served import frontend_memory, outcome, served, worker_pids
from scripts.serve.running import Running
from scripts.terminal import UserError, command, step

CLIENTS = 200
UPLOAD_BYTES = 19_000_000
# Each of the costly pictures so often.
COSTLY_TIMES = 4
# The frontend's heap limit in config.properties, as much again outside it for buffers on their way
# in, and what the Java runtime needs itself.
MAX_FRONTEND_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Flood:
    """What came of a flood.

    Attributes:
        uploads: how often each status was seen.
        costly: the same of the costly pictures.
        frontend_bytes: memory of the frontend right after.
    """

    uploads: Counter[str]
    costly: Counter[str]
    frontend_bytes: float


def flood(
    running: Running, clients: int, size: int, costly_pictures: Sequence[bytes] = ()
) -> Flood:
    """Uploads a picture of `size` bytes from so many clients at once, and the costly pictures.

    Raises:
        AssertionError: a status other than 200 and 503 (or 413, for a costly picture), or the
            frontend took too much memory, or a worker or the frontend ended.
    """
    picture = encode(Image.effect_noise((2000, 1500), 80))
    data = picture + bytes(size - len(picture))  # decoders ignore what follows a picture
    workers = worker_pids(running)
    with ThreadPoolExecutor(clients + len(costly_pictures)) as pool:
        uploads = [pool.submit(outcome, running, data) for _ in range(clients)]
        others = [pool.submit(outcome, running, one) for one in costly_pictures]
        found = Flood(
            Counter(upload.result() for upload in uploads),
            Counter(other.result() for other in others),
            frontend_memory(running, collected=False),
        )
    assert set(found.uploads) <= {"200", "503"}, f"other answers: {dict(found.uploads)}"
    assert found.uploads["200"] > 0
    assert set(found.costly) <= {"200", "413", "503"}, f"other answers: {dict(found.costly)}"
    memory = found.frontend_bytes
    assert memory < MAX_FRONTEND_BYTES, f"the frontend holds {memory / 1e9:.1f} GB"
    assert outcome(running, picture) == "200"
    assert worker_pids(running) == workers, "a worker was replaced"
    return found


def main(clients: Annotated[int, typer.Option(min=1)] = CLIENTS) -> None:
    """Many uploads of 19 MB and the costliest pictures at once; writes the result's page."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    pictures = list(costly()) * COSTLY_TIMES
    limit = pod_limit()
    try:
        with (
            memory_group(limit) as group,
            served(inside=group.entered() if group else None) as running,
        ):
            try:
                found = flood(running, clients, UPLOAD_BYTES, pictures)
            finally:
                # Where the kernel ended a process, that explains whatever else went wrong.
                within = _within(group, limit)
    except AssertionError as failure:
        raise UserError(str(failure)) from failure
    write_report(
        "flood",
        "A flood",
        [
            (
                f"{clients} uploads of {UPLOAD_BYTES / 1e6:.0f} MB and {len(pictures)} of the "
                "costliest pictures at once, two workers. Made by `make flood`."
            ),
            "",
            "| answer | uploads | costly pictures |",
            "|---|---|---|",
            *(
                f"| {status} | {found.uploads[status]} | {found.costly[status]} |"
                for status in sorted(found.uploads | found.costly)
            ),
            "",
            (
                "The same workers served before and after. The frontend held "
                f"{found.frontend_bytes / 1e6:.0f} MB right after."
            ),
            "",
            within,
        ],
    )
    step(within)


def _within(group: MemoryGroup | None, limit: int) -> str:
    """A sentence on the memory; `AssertionError` where the kernel had to end a process."""
    if group is None:
        return (
            "The server ran without a limit to its memory: that takes root and a memory cgroup "
            "below which groups can be made."
        )
    kills, peak = group.kills, group.peak
    assert kills == 0, f"the kernel ended {kills} processes of the server for want of memory"
    most = "" if peak is None else f"{peak / 2**30:.2f} GiB at most, the cache of files included; "
    return (
        f"The server ran within {limit / 2**30:g} GiB, a pod's limit in the Kubernetes deployment: "
        f"{most}no process was ended for want of memory."
    )


if __name__ == "__main__":
    command(main)
