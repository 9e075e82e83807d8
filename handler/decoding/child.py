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
    """Decode images from standard input until it ends, or until none arrives for a while."""
    _load_decoders()
    source = sys.stdin.buffer
    # Nothing that a library prints may get between the replies.
    target = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _limit_memory()
    send(target, {}, [])
    # Decoders warn about other people's files. Only now, so that an error at start is logged.
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    while select.select([source], [], [], IDLE_SECONDS)[0]:
        try:
            task, data = receive(source)
        except EOFError:
            return  # the worker is gone
        # From here on the kernel counts. The signal's default action is to kill the process.
        signal.setitimer(signal.ITIMER_PROF, task.pop("limit"))
        started = time.process_time()
        reply, content = _decode(task, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(target, {**reply, "seconds": time.process_time() - started}, [content])
        if reply.get("exits"):
            return


def _load_decoders() -> None:
    # Threads would spend the same CPU time, and each takes memory.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    try:
        import pi_heif  # the worker does without
    except ImportError:
        pass
    else:
        pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False)
    Image.init()


def _decode(task: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the reply's JSON and its bytes. If it has `exits`, the image may have left damage."""
    preprocessing = Preprocessing(**task.pop("preprocessing"))
    try:
        with without_warnings():
            image = decode_here(data, Task(preprocessing=preprocessing, **task))
    except ClientError as error:
        # A decoder that got no memory may have left anything behind.
        exits = isinstance(error.__cause__, MemoryError)
        return {"error": type(error).__name__, "message": str(error), "exits": exits}, b""
    except Exception as error:  # our own fault, for the worker's log
        return {"failure": f"{type(error).__name__}: {error}", "exits": True}, b""
    preview = image.preview
    content = image.pixels.tobytes() + (preview.tobytes() if preview is not None else b"")
    return {
        "size": image.size,
        "crop": image.crop,
        "preview": preview.size if preview is not None else None,
    }, content


def _limit_memory() -> None:
    """Limit the process to what it has now, and `DECODING_BYTES`."""
    with contextlib.suppress(OSError):
        # If memory is short all the same, the kernel kills this process first.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return  # macOS has no such limit; the timer remains
    (used,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))
    limit = int(used) * 1024 + DECODING_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
