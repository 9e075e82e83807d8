"""The worst body of each kind costs little, whatever its decoder does with it."""

import ctypes
import resource
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from handler.decoding import decode as decode_module
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.errors import ClientError
from handler.settings import DECODING_BYTES, MAX_REQUEST_BYTES, Preprocessing
from tests import costs
from tests.corpus import photograph
from tests.images import encode

KINDS = costs.kinds()
# CPU time of the worker and its decoder process, which has a timer of 1.3 s.
MAX_SECONDS = 2.0
# What may be decoded in the worker, and two copies of the body; with the decoder process, which has
# a limit of its own, less than 400 MB.
MAX_BYTES = 80_000_000 + 2 * MAX_REQUEST_BYTES


@pytest.mark.parametrize("name", KINDS)
def test_no_body_costs_more_than_the_limits(name: str) -> None:
    data = KINDS[name]()
    assert len(data) <= MAX_REQUEST_BYTES, "the frontend would reject it"
    decode(encode(photograph(), "GIF"), Preprocessing(), PixelBudget(64_000_000))
    started = sum(psutil.Process(decode_module._decoder_process.pid).cpu_times()[:2])
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = costs.kilobytes("VmRSS:")
    seconds = time.process_time() + cpu_of_children()
    with suppress(ClientError):  # any other error is the server's own
        decode(data, Preprocessing(), PixelBudget(64_000_000))
    decode_module._decoder_process.close()  # only now the kernel counts what it used
    assert time.process_time() + cpu_of_children() - seconds - started < MAX_SECONDS
    assert (costs.kilobytes("VmHWM:") - before) * 1024 < MAX_BYTES


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


_EIGHT_AT_ONCE = """
import struct, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from functools import partial
from handler import settings
from handler.decoding import budget, decode
from handler.inference import allocator
from tests.costs import kilobytes

read = sys.stdin.buffer.read
bodies = [read(*struct.unpack("<I", read(4))) for _ in range(2)]
allocator.keep_freed_memory()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
def job(data):
    decode.decode(data, settings.Preprocessing(), budget.PixelBudget(10**9))
with ThreadPoolExecutor(8) as pool:
    decode.run_all([partial(job, data) for data in bodies * 4], pool)
assert decode._decoder_process.pid is None
print(kilobytes("VmHWM:") - before)
"""


def test_large_images_in_eight_threads_stay_within_the_memory_limit_together() -> None:
    progressive = encode(photograph().resize((4000, 3000)), "JPEG", progressive=True)
    whole = encode(photograph().resize((2500, 2500)), "JPEG")
    result = subprocess.run(
        [sys.executable, "-c", _EIGHT_AT_ONCE],
        input=b"".join(struct.pack("<I", len(data)) + data for data in (progressive, whole)),
        capture_output=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert int(result.stdout) * 1024 < DECODING_BYTES
