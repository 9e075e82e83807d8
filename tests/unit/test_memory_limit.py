"""The limit to a server's memory, as `make flood` sets it."""

import subprocess
import sys

import pytest

from benchmarks.memory_limit import memory_group, pod_limit


def test_the_limit_is_the_deployments() -> None:
    assert pod_limit() == 8 << 30


def test_what_starts_in_a_group_is_held_to_its_limit() -> None:
    limit = 100_000_000
    with memory_group(limit) as group:
        if group is None:
            pytest.skip("NOT RUN: no memory cgroup can be made here, which takes root")
        folder = group.folder
        for length, ended in ((1_000_000, False), (400_000_000, True)):
            with group.entered():
                process = subprocess.Popen([sys.executable, "-c", f"bytearray(b'x' * {length})"])
            assert (process.wait() != 0) == ended
            assert group.kills == int(ended)
        assert group.peak is None or 1_000_000 < group.peak <= limit
    assert not folder.exists()
