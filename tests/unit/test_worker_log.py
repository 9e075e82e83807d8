"""Finding the root cause in the log of a worker that exited."""

from pathlib import Path

import pytest

from scripts.serve.worker_log import frontend_error, lines_from, root_cause

PREFIX = "2026-11-21T17:00:00,123 [INFO ] W-9000-densenet121_1.0-stdout MODEL_LOG - "

MISSING_MODULE = """\
Backend worker process died.
Traceback (most recent call last):
  File "/tmp/models/x/handler/decoding/decode.py", line 9, in <module>
    import PIL
ModuleNotFoundError: No module named 'PIL'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
    worker.run_server()
RuntimeError: this is a consequence
"""
ARCHIVE = """\
Failed to load model densenet121, exception model.onnx: cannot be loaded: Protobuf parsing failed.
Traceback (most recent call last):
handler.errors.ArchiveError: model.onnx: cannot be loaded: Protobuf parsing failed.
Backend worker process died.
RuntimeError: 500 - Unknown exception
"""
MEMORY = """\
Load model densenet121 cpu OOM, exception
Traceback (most recent call last):
    self.engine = load_engine(
numpy.core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB
MemoryError
Backend worker process died.
RuntimeError: 507 - System out of memory
"""


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (MISSING_MODULE, "ModuleNotFoundError: No module named 'PIL'"),
        (ARCHIVE, "model.onnx: cannot be loaded: Protobuf parsing failed."),
        (MEMORY, "MemoryError"),
        ("python: error while loading shared libraries: libpython3.11.so.1.0: missing", "python: "),
    ],
)
def test_the_root_cause_is_found(printed: str, reason: str) -> None:
    lines = printed.splitlines()
    for logged in (lines, [PREFIX + line for line in lines]):
        found = root_cause(logged)
        assert found is not None
        assert found.startswith(reason)


def test_a_healthy_start_has_no_cause() -> None:
    lines = [
        "Torch worker started.",
        "model_name: densenet121, batchSize: 8",
        "UserWarning: Error: this is printed by a library and no traceback",
        "Ready: densenet121 on ONNX Runtime 1.31.1, CPU, 1 to 2 thread(s)",
    ]
    assert root_cause(lines) is None
    assert root_cause(["RuntimeError: 507 - System out of memory"]) is None, (
        "TorchServe's conclusion"
    )


def test_only_lines_of_this_start_are_read_also_after_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "model.log"
    assert lines_from(log, 0) == []
    log.write_text("before\nafter\n")
    assert lines_from(log, 7) == ["after"]
    log.write_text("new\n")
    assert lines_from(log, 7) == ["new"]


def test_a_missing_gpu_is_not_why_the_frontend_exited(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(
        "2026-11-21 [ERROR] main SystemInfo - nvidia-smi not available or failed: Cannot run\n"
        "2026-11-21 [ERROR] main ModelServer - Failed to bind: Address already in use\n"
        "\tat java.base/sun.nio.ch.Net.bind0(Native Method)\n"
    )
    message = frontend_error(tmp_path)
    assert "Address already in use" in message
    assert "nvidia-smi" not in message
    log.write_text("")
    assert frontend_error(tmp_path) == f"See the logs in {tmp_path}."
