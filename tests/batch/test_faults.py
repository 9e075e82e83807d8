"""One row per image, although the program, actors and a node are killed during a job."""

import os
import signal
from collections import Counter
from pathlib import Path

from tests.batch.cluster import Cluster
from tests.batch.command import begin, ended, part_files, rows, wait_for

# The actors that load the model.
ACTOR = "MapWorker(MapBatches(Model))"
# More than Ray's usual limit of restarts and retries.
_KILLED_ACTORS = 4


def test_each_image_has_one_row_although_program_actors_and_a_node_are_killed(
    cluster: Cluster, small_archive: Path, images: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "results"
    where = ("--output", output, "--archive", small_archive, "--address", cluster.address)
    command = (images[0].parent, *where)
    job = begin(*command, environment=cluster.environment)
    wait_for(lambda: len(part_files(output)) > 3 or job.poll() is not None)
    os.killpg(job.pid, signal.SIGKILL)
    ended(job, -signal.SIGKILL)
    # Its tasks may still write complete parts.
    wait_for(lambda: not cluster.workers(ACTOR))
    written = {file: file.stat().st_mtime_ns for file in part_files(output)}
    assert 3 < len(written) < len(images) // 8

    job = begin(*command, environment=cluster.environment)
    killed: set[int] = set()
    while len(killed) < _KILLED_ACTORS and job.poll() is None:
        for actor in [one for one in cluster.workers(ACTOR) if one.pid not in killed][:1]:
            before = len(part_files(output))
            actor.kill()
            killed.add(actor.pid)
            # The next actor must work before it is killed.
            wait_for(lambda: len(part_files(output)) > before or job.poll() is not None)  # noqa: B023
    assert job.poll() is None, f"the job was done after {len(killed)} actors"
    cluster.kill(cluster.nodes[1])
    assert job.poll() is None, "the job was done before the node died"
    cluster.add()
    printed = ended(job)
    assert "have results already" in printed
    assert ", 0 rejected" in printed
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert Counter(row["path"] for row in rows(output)) == Counter(map(str, images))
