"""Time, memory and crashes of decoding are limited, whatever a decoder does."""

import dataclasses
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from PIL import Image, ImageFile

from handler.decoding import decode as decode_module
from handler.decoding import isolated as isolated_module
from handler.decoding import pillow
from handler.decoding.budget import MemoryBudget, PixelBudget
from handler.decoding.decode import decode
from handler.decoding.formats import probe
from handler.decoding.isolated import DecoderExitedError, DecoderProcess
from handler.errors import ClientError, DamagedImage, TooLarge
from handler.request import RequestImage, run_isolated
from handler.settings import DECODING_BYTES
from tests import costs
from tests.corpus import jpeg_with_size, photograph
from tests.images import MAX_PIXELS, PREPROCESSING, decoded, encode
from tests.kinds import PNG_START, chunk, png_header

GIF = encode(photograph(), "GIF")
JPEG = encode(photograph(), "JPEG")


# --- The decoder process, with code in place of its decoder ---

_PROGRAM = """
import sys
sys.path[:] = {path!r}
from handler.decoding import child
def decode(task, data):
    import os, re, signal, time
{body}
    return {{}}, data
child._decode = decode
child.main()
"""


class _Process(DecoderProcess):
    """A decoder process whose decoder is the given code."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.code = _PROGRAM.format(path=sys.path, body=textwrap.indent(body, "    "))

    def program(self) -> str:
        return self.code


@pytest.fixture
def process_of() -> Iterator[Callable[[str], _Process]]:
    """Makes decoder processes of given code, and closes them."""
    with ExitStack() as stack:
        yield lambda body: stack.enter_context(closing(_Process(body)))


ProcessOf = Callable[[str], _Process]


@pytest.mark.parametrize(
    ("decoder", "how"),
    [
        ("while True: pass", signal.SIGPROF),
        # In C, where nothing of Python's own interrupts it.
        ("re.match('(a*)*b', 'a' * 64)", signal.SIGPROF),
        ("os.kill(os.getpid(), signal.SIGSEGV)", signal.SIGSEGV),
        ("time.sleep(60)", signal.SIGKILL),
        ("os.closerange(0, 64); time.sleep(60)", signal.SIGKILL),
        # As the kernel does when memory is short.
        ("os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
    ],
)
def test_a_decoder_that_hangs_or_crashes_is_replaced(
    decoder: str, how: int, process_of: ProcessOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(f"if task['bad']:\n    {decoder}")
    assert process.decode({"bad": False}, [b"good"], 1.0)[1] == b"good"
    first = process.pid
    with monkeypatch.context() as patch:
        if "sleep" in decoder:
            patch.setattr(isolated_module, "_MAX_WALL_SECONDS", 0.3)
            patch.setattr(isolated_module, "_MAX_EXIT_SECONDS", 0.4)
        with pytest.raises(DecoderExitedError) as exited:
            process.decode({"bad": True}, [b"bad"], 0.1)
    assert exited.value.signal == how
    assert exited.value.ran_out_of_time == (how == signal.SIGPROF or "sleep" in decoder)
    assert exited.value.was_killed == ("SIGKILL" in decoder)
    assert process.decode({"bad": False}, [b"good", b" again"], 1.0)[1] == b"good again"
    assert process.pid != first


def test_an_image_whose_decoder_the_kernel_killed_needs_too_much_memory(
    process_of: ProcessOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of("os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(decode_module, "_decoder_process", process)
    with pytest.raises(TooLarge, match="needs more memory to decode than the server has left"):
        decoded(GIF)


@pytest.mark.parametrize("body", ["pass", "return {'exits': True}, data"])
def test_a_decoder_that_exited_while_idle_fails_no_image(body: str, process_of: ProcessOf) -> None:
    process = process_of(body)
    process.decode({}, [b"one"], 1.0)
    first = psutil.Process(process.pid)
    if body == "pass":
        first.kill()
    while first.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert process.decode({}, [b"two"], 1.0)[1] == b"two"


def test_a_decoder_gets_no_more_memory_than_its_limit(process_of: ProcessOf) -> None:
    process = process_of(
        "try:\n    bytearray(task['bytes'])\nexcept MemoryError:\n    return {'short': 1}, b''"
    )
    assert "short" not in process.decode({"bytes": DECODING_BYTES - 2_000_000}, [], 2.0)[0]
    assert "short" in process.decode({"bytes": DECODING_BYTES + 2_000_000}, [], 2.0)[0]


def test_each_image_has_the_whole_time_limit(process_of: ProcessOf) -> None:
    process = process_of("end = time.process_time() + 0.1\nwhile time.process_time() < end: pass")
    for _ in range(4):
        assert process.decode({}, [], 0.3)[0]["seconds"] >= 0.1


def test_a_decoder_process_that_cannot_start_is_an_error(process_of: ProcessOf) -> None:
    process = process_of("pass")
    process.code = "raise SystemExit(3)"
    with pytest.raises(RuntimeError, match="cannot start: exit status 3"):
        process.decode({}, [], 1.0)


def test_a_missing_decoder_is_the_servers_fault(
    process_of: ProcessOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow._check_decoders.cache_clear()
    webp, heic = encode(photograph(), "WEBP"), encode(photograph(), "HEIF")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.features.check", lambda name: name != "webp")
        with pytest.raises(RuntimeError, match="decoder of WEBP is missing"):
            decoded(webp)
    process = process_of("pass")
    process.code = (
        f"import sys; sys.path[:] = {sys.path!r}; sys.modules['pi_heif'] = None; "
        "from handler.decoding.child import main; main()"
    )
    monkeypatch.setattr(decode_module, "_decoder_process", process)
    with pytest.raises(RuntimeError, match="decoder of HEIF is missing"):
        decoded(heic)
    assert decoded(webp).pixels.any()


def test_an_unread_result_is_not_taken_for_the_next_images(
    process_of: ProcessOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    process = process_of("os.write(1, b'a warning')")  # nor is what a decoder prints
    assert process.decode({}, [b"one"], 1.0)[1] == b"one"
    with monkeypatch.context() as patch:
        patch.setattr(isolated_module, "receive", fail)
        with pytest.raises(MemoryError):
            process.decode({}, [b"two"], 1.0)
    assert process.decode({}, [b"three"], 1.0)[1] == b"three"


_WORKER = """
import sys, time
from handler import settings
from handler.decoding import budget, decode
data = sys.stdin.buffer.read()
decode.decode(data, settings.Preprocessing(), budget.PixelBudget(10**6))
print(decode._decoder_process.pid, flush=True)
time.sleep(60)
"""


def test_the_decoder_process_exits_with_its_worker() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(GIF)
        worker.stdin.close()
        decoder = psutil.Process(int(worker.stdout.readline()))
        assert decoder.is_running()
        worker.kill()
    decoder.wait(10)


# --- Limits of a request's images ---


@pytest.mark.parametrize(
    ("data", "budget", "error", "message"),
    [
        (GIF[:9000], {}, DamagedImage, "GIF image is damaged or cut off"),
        (
            encode(photograph(), "AVIF"),
            {"pixels": 1000},
            TooLarge,
            "320 x 240 pixels; the images of a request may have 1,000",
        ),
        (costs.black_png(8000, 8000, 8, 6), {}, TooLarge, "needs more than 210 MB of memory"),
        (
            costs.bmp_of_runs(2800, b"\1\1"),
            {"seconds": 0.1},
            TooLarge,
            r"takes too long to decode; the images .* may take 0.1 s",
        ),
    ],
)
def test_errors_of_the_decoder_process_are_the_clients(
    data: bytes, budget: dict[str, Any], error: type[ClientError], message: str
) -> None:
    with pytest.raises(error, match=message):
        decode(data, PREPROCESSING, PixelBudget(**({"pixels": MAX_PIXELS} | budget)))


def test_the_images_of_a_request_share_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    real = DecoderProcess.decode

    def counted(self: DecoderProcess, task: Any, pieces: Sequence[Any], limit: float) -> Any:
        limits.append(limit)
        return real(self, task, pieces, limit)

    monkeypatch.setattr(DecoderProcess, "decode", counted)
    budget = PixelBudget(16 * MAX_PIXELS, 0.1)
    runs = costs.bmp_of_runs(2800, b"\1\1")
    for _ in range(16):
        with pytest.raises(TooLarge):
            decode(runs, PREPROCESSING, budget)
    assert limits == [pytest.approx(0.1)]


def test_time_in_the_worker_counts_toward_the_limit() -> None:
    budget = PixelBudget(MAX_PIXELS, 0.1)
    with budget.timed():
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
    with pytest.raises(TooLarge, match="takes too long"), budget.timed():
        pass


def test_an_error_does_not_keep_the_image_in_memory() -> None:
    """Its traceback would, until the whole batch has its responses."""
    image = RequestImage("id", "a", JPEG[: len(JPEG) // 2])

    def stage(one: RequestImage) -> None:
        decoded(one.data)

    run_isolated(image, stage)
    error = image.error
    assert isinstance(error, DamagedImage)
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def _hidden_in_jpeg() -> bytes:
    """A small image after what looks like a segment, in which decoders find a costly one."""
    tiny = encode(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    scan_without_data = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0"
    hidden = jpeg_with_size(tiny[2:-2], 4000, 4000) + 600 * scan_without_data + b"\xff\xd9"
    return JPEG[:2] + b"\xff\0" + struct.pack(">H", len(hidden) + 2) + hidden + JPEG[2:]


COSTLY_PNG = costs.black_png(8000, 8000, 8, 6)
HIDDEN = {
    "JPEG": _hidden_in_jpeg(),
    "PNG": PNG_START + chunk(b"tEXt", png_header(300, 300, 8, 2)[16:29]) + COSTLY_PNG[8:],
    "PNG twice": encode(photograph())[:33] + COSTLY_PNG[8:],
}


@pytest.mark.parametrize("data", HIDDEN.values(), ids=HIDDEN)
def test_the_worker_never_decodes_an_image_that_is_hidden_in_another(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded here"))
    with pytest.raises(ClientError):
        decode(data, PREPROCESSING, PixelBudget(1_000_000, 0.5))


@pytest.mark.parametrize("isolated", [False, True])
def test_a_decoder_that_sees_another_size_than_the_header_is_stopped(
    isolated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = dataclasses.replace(probe(JPEG), size=(10, 10))
    monkeypatch.setattr(decode_module, "probe", lambda _: header)
    with pytest.raises(DamagedImage, match="its header gives two sizes"):
        decoded(JPEG, isolated=isolated)


def test_ordinary_images_are_decoded_in_the_worker() -> None:
    decode_module._decoder_process.close()
    large = photograph().resize((4000, 3000))
    progressive = encode(large, "JPEG", progressive=True)
    for data in (JPEG, encode(photograph()), encode(photograph(), "WEBP"), progressive):
        decoded(data)
        assert decode_module._decoder_process.pid is None


# --- Memory of several images at once ---


def test_images_that_do_not_fit_wait_for_memory() -> None:
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
    with memory.reserved(1000):
        pass  # more than there is: it gets all of it


def test_an_image_that_needs_too_much_memory_is_rejected_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        decode_module._decoder_process, "decode", lambda *_: pytest.fail("it was decoded")
    )
    data = bytearray(encode(photograph(), "WEBP"))
    data[26:30] = struct.pack("<HH", 8000, 8000)  # of the frame's header
    with pytest.raises(TooLarge, match=r"8000 x 8000 pixels.* needs more than 210 MB"):
        decoded(bytes(data))
