"""The worst body of each kind costs the worker little, whatever its decoder does with it."""

import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from handler.errors import ClientError
from handler.images import PixelBudget, decode
from handler.settings import DECODING_BYTES, MAX_REQUEST_BYTES, Preprocessing
from tests import costs
from tests.corpus import photograph
from tests.pictures import encode

KINDS = costs.kinds()
# About a tenth of a second was measured, and half a second of decoding is allowed here. A body that
# takes quadratic time, or unpacks to gigabytes, takes minutes. The decoder process has a timer.
FAR_TOO_MANY_SECONDS = 10
# What may be decoded here, and two copies of the body; the decoder process has a limit of its own.
MOST_BYTES = 80_000_000 + 2 * MAX_REQUEST_BYTES


@pytest.mark.parametrize("name", KINDS)
def test_no_body_costs_the_worker_more_than_the_limits(name: str) -> None:
    data = KINDS[name]()
    assert len(data) <= MAX_REQUEST_BYTES, "the frontend would reject it"
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, started = costs.kilobytes("VmRSS:"), time.process_time()
    with suppress(ClientError):  # any other error is the server's own
        decode(data, Preprocessing(), PixelBudget(64_000_000))
    assert time.process_time() - started < FAR_TOO_MANY_SECONDS
    assert (costs.kilobytes("VmHWM:") - held) * 1024 < MOST_BYTES


_EIGHT_AT_ONCE = """
import struct, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from handler import allocator, images, settings
from tests.costs import kilobytes

read = sys.stdin.buffer.read
bodies = [read(*struct.unpack("<I", read(4))) for _ in range(2)]
allocator.keep_freed_memory()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
jobs = [(data, images.PixelBudget(10**9), images.decode) for data in bodies * 4]
with ThreadPoolExecutor(8) as pool:
    done = images.decode_all(jobs, settings.Preprocessing(), pool)
assert not any(isinstance(image, Exception) for image in done), done
assert images._decoder_process.pid is None
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
