"""Decode images in a small process whose time and memory the kernel limits.

A decoder in C cannot be stopped from within its own process, and its memory use cannot be
predicted. In the decoder process, a kernel timer (ITIMER_PROF, CPU time) kills the process when the
image has used its time, and RLIMIT_DATA makes allocations above the limit fail. (RLIMIT_CPU counts
whole seconds since the process started, and RLIMIT_AS includes the shared libraries.) The worker
enforces a limit of wall time. In each case only this image fails, and the worker keeps running.

A worker has at most one decoder process. It starts with the first image that needs it, is reused,
and exits when idle or when the worker exits.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock, Timer
from typing import IO, Any

# The process exits after this many seconds without an image.
IDLE_SECONDS = 60

# Wall time for one image, for a process that hangs, or a machine so busy that the request fails
# anyway (`responseTimeout` is 60 s).
_MAX_WALL_SECONDS = 30.0
# Time to exit for a process that closed its pipes.
_MAX_EXIT_SECONDS = 5.0

# CPU time charged to a request whose image crashes the process, for the restart.
RESTART_SECONDS = 0.3

# The prefix of a message: the lengths of its JSON and of the content after it, in bytes.
_PREFIX = struct.Struct("<II")

# glibc's allocator in the process: one heap, and large blocks are returned to the kernel at once.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "OPENBLAS_NUM_THREADS": "1",
}


class DecoderExitedError(Exception):
    """The decoder process exited while decoding this image.

    Attributes:
        ran_out_of_time: the kernel's timer or the limit of wall time killed it.
        was_killed: another SIGKILL, from the kernel when the machine is out of memory.
    """

    def __init__(self, signal_number: int, *, overdue: bool) -> None:
        super().__init__(f"the decoder process exited with signal {signal_number}")
        self.signal = signal_number
        self.ran_out_of_time = overdue or signal_number == signal.SIGPROF
        self.was_killed = signal_number == signal.SIGKILL and not overdue


class DecoderProcess:
    """Starts the decoder process and sends it one image at a time; can be shared by threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def decode(
        self, task: Mapping[str, Any], pieces: Sequence[bytes | memoryview], seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send one image to the process; return the reply's JSON, with `seconds`, and its bytes.

        `task` has the fields of `handler.decoding.pillow.Task`, `seconds` is the CPU time, above 0,
        that the image may take.

        Raises:
            DecoderExitedError: the image took too long or crashed the process.
        """
        with self._lock:
            for _ in range(2):
                if self._process is not None and self._process.poll() is not None:
                    self._reap(self._process)  # it exited while idle
                process = self._process or self._start()
                started = time.monotonic()
                try:
                    with _deadline(process):
                        send(process.stdin, {**task, "limit": seconds}, pieces)
                        return receive(process.stdout)
                except (OSError, EOFError):
                    code = self._reap(process)
                    if code:
                        break
                    # Exit status 0: it exited because it was idle. Retry with a new process.
                except BaseException:
                    # Without the kill, the next image would get this reply.
                    process.kill()
                    self._reap(process)
                    raise
            overdue = time.monotonic() - started >= _MAX_WALL_SECONDS
            raise DecoderExitedError(max(0, -code), overdue=overdue)

    def close(self) -> None:
        """Stop the process, if there is one."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._reap(self._process)

    @property
    def pid(self) -> int | None:
        """Return the process's id; None if there is none."""
        return self._process.pid if self._process is not None else None

    def program(self) -> str:
        """Return the process's Python code, which runs `handler.decoding.child`."""
        return (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from handler.decoding.child import main; main()"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        # -I ignores TorchServe's PYTHON variables and the archive's sitecustomize.
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", self.program()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ALLOCATOR},
        )
        try:
            with _deadline(process):
                receive(process.stdout)
        except EOFError as error:
            code = self._reap(process)
            raise RuntimeError(f"The decoder process cannot start: exit status {code}.") from error
        self._process = process
        return process

    def _reap(self, process: "subprocess.Popen[bytes]") -> int:
        """Return the exit status of a process that closed its pipes or was killed."""
        self._process = None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            return process.wait(_MAX_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@contextlib.contextmanager
def _deadline(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kill the process at the limit of wall time, which unblocks reads and writes of its pipes."""
    timer = Timer(_MAX_WALL_SECONDS, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def send(
    target: IO[bytes] | None, message: Mapping[str, Any], pieces: Sequence[bytes | memoryview]
) -> None:
    """Write a message: JSON, followed by the bytes of all pieces."""
    assert target is not None
    text = json.dumps(message).encode()
    target.write(_PREFIX.pack(len(text), sum(map(len, pieces))) + text)
    for piece in pieces:
        target.write(piece)
    target.flush()


def receive(source: IO[bytes] | None) -> tuple[dict[str, Any], bytes]:
    """Read a message that `send` wrote; raise `EOFError` if the other process exited."""
    assert source is not None
    lengths = _PREFIX.unpack(_read(source, _PREFIX.size))
    text, content = (_read(source, length) for length in lengths)
    return json.loads(text), content


def _read(source: IO[bytes], length: int) -> bytes:
    content = source.read(length)
    if len(content) < length:
        raise EOFError
    return content
