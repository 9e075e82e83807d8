"""The decoder process: decode the images that `handler.decoding.isolated` sends, one at a time."""

import contextlib
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from PIL import AvifImagePlugin, Image

from handler.decoding.isolated import IDLE_SECONDS, receive, send
from handler.decoding.pillow import Task, decode_here, without_warnings
from handler.errors import ClientError
from handler.settings import DECODING_BYTES, Preprocessing


def main() -> None:
    """Decode images from standard input until its end, or until none arrives for 60 s."""
    _load_decoders()
    source = sys.stdin.buffer
    # Replies use a copy of standard output, so that a library's prints cannot corrupt them.
    target = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _limit_memory()
    send(target, {}, [])
    # Discard the decoders' warnings about images; not earlier, so that errors at start are logged.
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    while select.select([source], [], [], IDLE_SECONDS)[0]:
        try:
            task, data = receive(source)
        except EOFError:
            return  # the worker has exited
        # The kernel counts the CPU time. The signal's default action is to kill the process.
        signal.setitimer(signal.ITIMER_PROF, task.pop("limit"))
        started = time.process_time()
        reply, content = _decode(task, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(target, {**reply, "seconds": time.process_time() - started}, [content])
        if reply.get("exits"):
            return


def _load_decoders() -> None:
    # More threads would use the same CPU time and more memory.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    try:
        import pi_heif  # optional
    except ImportError:
        pass
    else:
        pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False)
    Image.init()


def _decode(task: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the reply's JSON and bytes; `exits` if the process must not decode another image."""
    preprocessing = Preprocessing(**task.pop("preprocessing"))
    try:
        with without_warnings():
            image = decode_here(data, Task(preprocessing=preprocessing, **task))
    except ClientError as error:
        # After a failed allocation the decoder's state is undefined.
        exits = isinstance(error.__cause__, MemoryError)
        return {"error": type(error).__name__, "message": str(error), "exits": exits}, b""
    except Exception as error:  # an internal error, for the worker's log
        return {"failure": f"{type(error).__name__}: {error}", "exits": True}, b""
    preview = image.preview
    content = image.pixels.tobytes() + (preview.tobytes() if preview is not None else b"")
    return {
        "size": image.size,
        "crop": image.crop,
        "preview": preview.size if preview is not None else None,
    }, content


def _limit_memory() -> None:
    """Limit the process to its current memory plus `DECODING_BYTES`."""
    with contextlib.suppress(OSError):
        # If the machine runs out of memory, the kernel kills this process first.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return  # macOS: no memory limit, only the timer
    (used,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))
    limit = int(used) * 1024 + DECODING_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
