"""Decodes pictures in a small process of its own, whose time and memory the kernel bounds.

A decoder in C cannot be stopped from beside it in the same process, and what one takes of memory
nobody can foresee. So pictures whose cost does not follow from their header are decoded here: a
timer of the kernel ends the process once it has used the time that the picture may cost, a limit
of the kernel refuses memory above the bound, and a decoder that crashes takes nothing else along.
The worker goes on in each case and answers that one picture with an error.

A worker has one such process at most, started when first needed, kept for the next picture and
ended when idle, or when the worker is gone. It knows nothing of the model.
"""

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event, Lock, Timer
from typing import IO, Any

from handler.settings import DECODING_BYTES

# Seconds without a picture after which the process ends.
IDLE_SECONDS = 60

# Of wall time, after which something other than work must hold the process: it sleeps, or the
# machine is so busy that the request is lost anyway (`responseTimeout` is 60 s).
_STUCK_SECONDS = 30

# What a picture that ends the process costs above its own time: starting the next one.
RESTART_SECONDS = 0.3

# Before a message: bytes of its JSON, and of what follows that.
_PREFIX = struct.Struct("<II")

# glibc's allocator in the process: one heap, and large blocks go back at once.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "OPENBLAS_NUM_THREADS": "1",
}


# In the process: a question and an encoded picture -> the answer's JSON and bytes.
Answer = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]


class DecoderEndedError(Exception):
    """The process ended on this picture.

    Attributes:
        signal: that ended it; 0 for an exit.
        was_stuck: the worker sent that signal, because nothing happened for too long.
    """

    def __init__(self, signal_number: int, *, was_stuck: bool) -> None:
        super().__init__(f"the decoder process ended with signal {signal_number}")
        self.signal = signal_number
        self.was_stuck = was_stuck

    @property
    def ran_out_of_time(self) -> bool:
        """The kernel's timer ended it, or it was stuck."""
        return self.signal == signal.SIGPROF or self.was_stuck

    @property
    def was_killed(self) -> bool:
        """Somebody else ended it: the kernel, where the machine has no memory left."""
        return self.signal == signal.SIGKILL and not self.was_stuck


class DecoderProcess:
    """The worker's end; threads may share it, and take turns."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(
        self, question: Mapping[str, Any], pieces: Sequence[bytes | memoryview], seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Has one picture decoded.

        Args:
            question: JSON, for `answer` in `serve`.
            pieces: the encoded picture.
            seconds: of CPU that it may take, above 0.

        Returns:
            the answer's JSON, with `seconds` that it took, and its bytes.

        Raises:
            DecoderEndedError: the picture took too long, or ended the process otherwise.
        """
        with self._lock:
            for _ in range(2):
                process = self._living() or self._start()
                stuck = Event()
                try:
                    with _not_stuck(process, stuck):
                        _send(process.stdin, {**question, "limit": seconds}, pieces)
                        return _receive(process.stdout)
                except (OSError, EOFError):
                    code = self._ended(process)
                    if code:
                        break
                    # It had been idle for too long just then.
                except BaseException:
                    # An answer that nobody took would be the next picture's.
                    process.kill()
                    self._ended(process)
                    raise
            raise DecoderEndedError(max(0, -code), was_stuck=stuck.is_set())

    def close(self) -> None:
        """Ends the process, if there is one."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._ended(self._process)

    @property
    def pid(self) -> int | None:
        """The process's id; None where there is none."""
        return self._process.pid if self._process is not None else None

    def program(self) -> str:
        """The process's Python code; it ends in `serve`."""
        return (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from handler.images import serve_decoding; serve_decoding()"
        )

    def _living(self) -> "subprocess.Popen[bytes] | None":
        """The process, unless it ended while it was idle: no picture is to blame for that."""
        if self._process is not None and self._process.poll() is not None:
            self._ended(self._process)
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        # Isolated from the environment: TorchServe's, and what the archive does at Python's start.
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", self.program()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ALLOCATOR},
        )
        try:
            with _not_stuck(process, Event()):
                _receive(process.stdout)
        except EOFError as error:
            code = str(self._ended(process))
            raise RuntimeError(
                f"The decoder process cannot start: it ended with {code}."
            ) from error
        self._process = process
        return process

    def _ended(self, process: "subprocess.Popen[bytes]") -> int:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process.wait()


@contextlib.contextmanager
def _not_stuck(process: "subprocess.Popen[bytes]", stuck: Event) -> Iterator[None]:
    """Ends the process where it does nothing for too long, and then sets `stuck`."""

    def end() -> None:
        stuck.set()
        process.kill()

    timer = Timer(_STUCK_SECONDS, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _send(
    target: IO[bytes] | None, message: Mapping[str, Any], pieces: Sequence[bytes | memoryview]
) -> None:
    assert target is not None
    text = json.dumps(message).encode()
    target.write(_PREFIX.pack(len(text), sum(map(len, pieces))) + text)
    for piece in pieces:
        target.write(piece)
    target.flush()


def _receive(source: IO[bytes] | None) -> tuple[dict[str, Any], bytes]:
    assert source is not None
    lengths = _PREFIX.unpack(_read(source, _PREFIX.size))
    text, content = (_read(source, length) for length in lengths)
    return json.loads(text), content


def _read(source: IO[bytes], length: int) -> bytes:
    content = source.read(length)
    if len(content) < length:
        raise EOFError
    return content


# --- The process itself ---


def serve(answer: Answer) -> None:
    """Answers questions on standard input until it ends or none comes for a while.

    Args:
        answer: question and encoded picture -> (JSON, bytes). After an answer whose JSON has
            `ends` the process ends, because of what the picture may have left behind.
    """
    source = sys.stdin.buffer
    # What a library prints must not be taken for an answer.
    target = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _bound_memory()
    _send(target, {}, [])
    # Decoders warn of strangers' files. Only now, so that what kept it from starting is in the log.
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    while select.select([source], [], [], IDLE_SECONDS)[0]:
        try:
            question, data = _receive(source)
        except EOFError:
            return  # the worker is gone
        # From here on the kernel counts. The signal's default is to end the process.
        signal.setitimer(signal.ITIMER_PROF, question["limit"])
        started = time.process_time()
        reply, content = answer(question, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(target, {**reply, "seconds": time.process_time() - started}, [content])
        if reply.get("ends"):
            return


def _bound_memory() -> None:
    """From here on: what is there now, and `DECODING_BYTES`."""
    with contextlib.suppress(OSError):
        # Where memory is short all the same, the kernel ends this process first.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return  # macOS has no such limit; the estimates before decoding and the timer remain
    (used,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))
    most = int(used) * 1024 + DECODING_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
