"""What pictures cost: the worst of each kind, and the limits that hold whatever a decoder does."""

import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
from PIL import Image

from handler import decoder_process, images
from handler.decoder_process import DecoderEndedError, DecoderProcess
from handler.errors import ClientError, DamagedImage, TooLarge
from handler.images import MemoryBudget, PixelBudget, decode
from handler.settings import (
    ADDED_BYTES,
    DECODING_BYTES,
    MAX_REQUEST_BYTES,
    Preprocessing,
    Settings,
)
from tests import costs
from tests.corpus import chunk, photograph
from tests.pictures import encode

PREPROCESSING = Preprocessing()
MAX_PIXELS = 64_000_000
MAX_SECONDS = 2.0
# What a decoder process takes to start, of CPU, on the machine that the limit was chosen on.
SECONDS_TO_START = 0.16
# Of one picture: what decoding may take, the decoder process, and the body.
MAX_MEGABYTES = (ADDED_BYTES - 7 * MAX_REQUEST_BYTES) / 1e6


@pytest.fixture
def probe() -> Iterator[costs.Probe]:
    process = costs.Probe()
    yield process
    process.close()


def test_no_picture_costs_more_than_the_bounds(probe: costs.Probe, note: list[str]) -> None:
    rows = []
    for name, make in costs.kinds():
        data = make()
        assert len(data) <= costs.LARGEST + 4096, f"{name}: the frontend would refuse it"
        cost = probe.measure(data)
        rows.append((cost.seconds, name, len(data), cost))
    assert len(rows) >= 100
    note.append(
        f"{len(rows)} kinds of costly pictures; most CPU {max(rows)[0]:.2f} s, most memory "
        f"{max(cost.megabytes for *_, cost in rows):.0f} MB:"
    )
    note.extend(
        f"  {name:<46} {size:>9} B {cost.seconds:>5.2f} s {cost.megabytes:>4.0f} MB  {cost.answer}"
        for _, name, size, cost in rows
    )
    most = _most_seconds(probe)
    too_slow = [name for seconds, name, *_ in rows if seconds > most]
    too_large = [name for _, name, _, cost in rows if cost.megabytes > MAX_MEGABYTES]
    assert (too_slow, too_large) == ([], [])


def test_sixteen_costly_pictures_in_one_request_cost_no_more_than_one(probe: costs.Probe) -> None:
    """What each may cost is shared by all of a request."""
    cost = probe.measure(costs._bmp_of_runs(2800, 1, b"\1\1"), times=16)
    assert cost.answer == "413 TooLarge"
    assert cost.seconds < _most_seconds(probe)


def _most_seconds(probe: costs.Probe) -> float:
    """2 s on the machine that the limit was chosen on.

    Of these the kernel's timer measures out most; the rest, to start a decoder and to walk over a
    file, takes longer on a slower machine or a busy one.
    """
    starting = statistics.median(
        probe.measure(costs._bmp_of_runs(20, 1, b"\1\1")).seconds for _ in range(3)
    )
    slower = max(1.0, starting / SECONDS_TO_START)
    return Settings.max_seconds + (MAX_SECONDS - Settings.max_seconds) * slower


# --- The decoder process. What it runs stands for a decoder that nobody thought of. ---

_PROGRAM = """
import sys
sys.path[:] = {path!r}
from handler.decoder_process import serve
def answer(question, data):
{body}
serve(answer)
"""


class _Process(DecoderProcess):
    """A decoder process whose decoder is the given code."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.code = _PROGRAM.format(path=sys.path, body=textwrap.indent(body, "    "))

    def program(self) -> str:
        return self.code


@pytest.mark.parametrize(
    ("decoder", "how"),
    [
        ("while True: pass", signal.SIGPROF),
        # In C, where nothing of Python's own interrupts it.
        ("import re; re.match('(a*)*b', 'a' * 64)", signal.SIGPROF),
        ("import os; os.kill(os.getpid(), 11)", signal.SIGSEGV),
        ("import os; os.abort()", signal.SIGABRT),
    ],
)
def test_a_decoder_that_hangs_or_crashes_is_ended_and_replaced(decoder: str, how: int) -> None:
    process = _Process(f"if question['bad']:\n    {decoder}\nreturn {{}}, data")
    try:
        assert process.ask({"bad": False}, [b"good"], 1.0)[1] == b"good"
        first = process.pid
        with pytest.raises(DecoderEndedError) as ended:
            process.ask({"bad": True}, [b"bad"], 0.2)
        assert ended.value.signal == how
        assert process.ask({"bad": False}, [b"good", b" again"], 1.0)[1] == b"good again"
        assert process.pid != first
    finally:
        process.close()


@pytest.mark.parametrize(
    ("decoder", "ran_out_of_time"),
    [
        ("import time; time.sleep(60)", True),
        # As the kernel does where memory is short.
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False),
    ],
)
def test_a_decoder_that_is_stuck_is_told_from_one_that_somebody_else_killed(
    monkeypatch: pytest.MonkeyPatch, decoder: str, *, ran_out_of_time: bool
) -> None:
    process = _Process(f"if question['bad']:\n    {decoder}\nreturn {{}}, data")
    try:
        process.ask({"bad": False}, [b"good"], 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(decoder_process, "_STUCK_SECONDS", 1)
            with pytest.raises(DecoderEndedError) as ended:
                process.ask({"bad": True}, [b"bad"], 1.0)
        assert ended.value.signal == signal.SIGKILL
        assert ended.value.ran_out_of_time == ran_out_of_time
        assert ended.value.was_killed != ran_out_of_time
        assert process.ask({"bad": False}, [b"good"], 1.0)[1] == b"good"
    finally:
        process.close()


def test_a_picture_whose_decoder_the_kernel_killed_needs_too_much_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = _Process("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(images, "_decoder_process", process)
    with pytest.raises(TooLarge, match="needs more memory to decode than the server has left"):
        decode(encode(photograph(), "GIF"), PREPROCESSING, PixelBudget(MAX_PIXELS))


def test_a_decoder_that_was_killed_while_idle_is_no_pictures_fault() -> None:
    process = _Process("return {}, data")
    try:
        process.ask({}, [b"one"], 1.0)
        first = process.pid
        assert first is not None
        # Not waited for: its end must be found out by the next question.
        psutil.Process(first).kill()
        while psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert process.ask({}, [b"two"], 1.0)[1] == b"two"
    finally:
        process.close()


def test_a_decoder_gets_no_more_memory_than_its_bound() -> None:
    process = _Process(
        "try:\n    bytearray(question['bytes'])\n"
        "except MemoryError:\n    return {'got': False}, b''\n"
        "return {'got': True}, b''"
    )
    try:
        assert process.ask({"bytes": DECODING_BYTES - 2_000_000}, [], 2.0)[0]["got"]
        assert not process.ask({"bytes": DECODING_BYTES + 2_000_000}, [], 2.0)[0]["got"]
    finally:
        process.close()


def test_time_is_counted_for_each_picture_anew() -> None:
    process = _Process(
        "import time\nend = time.process_time() + 0.2\n"
        "while time.process_time() < end: pass\nreturn {}, b''"
    )
    try:
        for _ in range(4):
            assert process.ask({}, [], 0.6)[0]["seconds"] >= 0.2
    finally:
        process.close()


def test_a_decoder_process_that_ended_while_idle_is_started_again() -> None:
    process = _Process("return {'ends': True}, data")
    try:
        process.ask({}, [b"one"], 1.0)
        first = process.pid
        assert first is not None
        psutil.Process(first).wait(10)
        assert process.ask({}, [b"two"], 1.0)[1] == b"two"
    finally:
        process.close()


def test_a_decoder_process_that_cannot_start_says_so() -> None:
    process = _Process("pass")
    process.code = "raise SystemExit(3)"
    with pytest.raises(RuntimeError, match="cannot start: it ended with 3"):
        process.ask({}, [], 1.0)


_WORKER = """
import sys, time
from handler import images, settings
data, budget = sys.stdin.buffer.read(), images.PixelBudget(10**6)
images.decode(data, settings.Preprocessing(), budget)
print(images._decoder_process.pid, flush=True)
time.sleep(60)
"""


def test_the_decoder_process_ends_with_its_worker() -> None:
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _WORKER,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(encode(photograph(), "GIF"))
    worker.stdin.close()
    decoder = psutil.Process(int(worker.stdout.readline()))
    assert decoder.is_running()
    worker.kill()
    worker.wait()
    worker.stdout.close()
    decoder.wait(10)


def test_the_worker_is_told_what_was_wrong_in_the_decoder_process() -> None:
    whole = encode(photograph(), "GIF")
    with pytest.raises(DamagedImage, match="GIF image is damaged or cut off"):
        decode(whole[: len(whole) // 2], PREPROCESSING, PixelBudget(MAX_PIXELS))
    with pytest.raises(TooLarge, match="320 x 240 pixels; the images of a request may have 1,000"):
        decode(encode(photograph(), "AVIF"), PREPROCESSING, PixelBudget(1000))
    with pytest.raises(TooLarge, match="needs more than 210 MB of memory"):
        decode(costs._black(8000, 8000, 8, 6), PREPROCESSING, PixelBudget(MAX_PIXELS))
    with pytest.raises(TooLarge, match=r"takes too long to decode; the images .* may take 0.3 s"):
        decode(costs._bmp_of_runs(2800, 1, b"\1\1"), PREPROCESSING, PixelBudget(MAX_PIXELS, 0.3))


def test_an_answer_that_nobody_took_is_no_other_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = _Process("return {}, data")
    try:
        assert process.ask({}, [b"one"], 1.0)[1] == b"one"
        with monkeypatch.context() as patch:
            patch.setattr(decoder_process, "_receive", _fail)
            with pytest.raises(MemoryError):
                process.ask({}, [b"two"], 1.0)
        assert process.ask({}, [b"three"], 1.0)[1] == b"three"
    finally:
        process.close()


def _fail(_: object) -> None:
    raise MemoryError


def test_what_a_decoder_prints_is_no_answer() -> None:
    process = _Process("import os\nos.write(1, b'a warning')\nreturn {}, data")
    try:
        assert process.ask({}, [b"one"], 1.0)[1] == b"one"
    finally:
        process.close()


def _hidden_in_jpeg() -> bytes:
    """A small picture after what looks like a segment, in which decoders find a costly one."""
    tiny = encode(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    scan_without_data = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0"
    hidden = costs._with_size(tiny[2:-2], 4000, 4000) + 600 * scan_without_data + b"\xff\xd9"
    whole = encode(photograph(), "JPEG")
    return whole[:2] + b"\xff\0" + struct.pack(">H", len(hidden) + 2) + hidden + whole[2:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_hidden_in_jpeg(), id="JPEG"),
        pytest.param(
            costs._header(300, 300, 8, 2)[:8]
            + chunk(b"tEXt", costs._header(300, 300, 8, 2)[16:29])
            + costs._black(8000, 8000, 8, 6)[8:],
            id="PNG",
        ),
        pytest.param(
            encode(photograph(), "PNG")[:33] + costs._black(8000, 8000, 8, 6)[8:], id="PNG twice"
        ),
    ],
)
def test_a_picture_that_hides_another_costs_no_more_than_it_says(data: bytes) -> None:
    before = time.process_time()
    with pytest.raises(ClientError):
        decode(data, PREPROCESSING, PixelBudget(1_000_000, 0.5))
    images._decoder_process.close()
    assert time.process_time() - before < 0.5


def test_ordinary_pictures_need_no_other_process() -> None:
    images._decoder_process.close()
    rgb = photograph().resize((4000, 3000))
    for data in (
        encode(photograph(), "JPEG"),
        encode(photograph(), "JPEG", progressive=True),
        encode(photograph(), "PNG"),
        encode(photograph(), "WEBP"),
        encode(rgb, "JPEG"),
        encode(rgb, "JPEG", progressive=True),
    ):
        decode(data, PREPROCESSING, PixelBudget(MAX_PIXELS))
        assert images._decoder_process.pid is None


# --- Memory of several at once ---


def test_pictures_that_do_not_fit_wait_for_memory() -> None:
    memory, inside, leave = MemoryBudget(100), Event(), Event()
    entered: list[str] = []

    def take(name: str, needed: int) -> None:
        with memory.reserved(needed):
            entered.append(name)
            inside.set()
            assert leave.wait(10)

    threads = [Thread(target=take, args=("first", 60))]
    threads[0].start()
    assert inside.wait(10)
    threads += [Thread(target=take, args=args) for args in (("large", 60), ("small", 40))]
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 10
    while len(entered) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert entered == ["first", "small"]
    leave.set()
    for thread in threads:
        thread.join()
    assert entered == ["first", "small", "large"]


def test_a_picture_that_needs_more_than_all_memory_gets_all_of_it() -> None:
    with MemoryBudget(100).reserved(1000):
        pass


_EIGHT_AT_ONCE = """
import struct, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from handler import allocator, images, settings
from tests.costs import kilobytes

read = sys.stdin.buffer.read
pictures = [read(*struct.unpack("<I", read(4))) for _ in range(2)]
allocator.keep_freed_memory()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
jobs = [(data, images.PixelBudget(10**9), images.decode) for data in pictures * 6]
with ThreadPoolExecutor(8) as pool:
    done = images.decode_all(jobs, settings.Preprocessing(), pool)
assert not any(isinstance(image, Exception) for image in done), done
assert images._decoder_process.pid is None
print(kilobytes("VmHWM:") - before)
"""


_ONE_AFTER_ANOTHER = """
import sys
from pathlib import Path
from handler import images, settings
from tests.costs import kilobytes

data = sys.stdin.buffer.read()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
jobs = [(data, images.PixelBudget(10**9), images.decode) for _ in range(30)]
done = images.decode_all(jobs, settings.Preprocessing(), None)
assert all(isinstance(error, images.DamagedImage) for error in done), done
assert images._decoder_process.pid is None
print(kilobytes("VmHWM:") - before)
"""


def test_what_was_wrong_with_a_picture_does_not_keep_the_picture() -> None:
    """An exception's traceback would, until the whole batch is answered."""
    jpeg = encode(photograph().resize((2500, 2500)), "JPEG")
    result = subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_ANOTHER],
        input=jpeg[: len(jpeg) // 2],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert int(result.stdout) * 1024 < 2 * 2500 * 2500 * 4


def test_what_a_picture_did_not_take_of_its_time_is_left_for_the_next() -> None:
    budget = PixelBudget(MAX_PIXELS, 0.5)
    for _ in range(5):
        with budget.reserved(0.4):
            pass
    with pytest.raises(TooLarge), budget.reserved(0.5), budget.reserved(0.1):
        pass


def test_large_pictures_in_eight_threads_stay_within_the_bound_together() -> None:
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
