"""What a person reads when the packages cannot be installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bootstrap


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        ("fatal error: Python.h: No such file or directory", "Python's headers are missing"),
        ("ERROR: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: No matching distribution found for torch==2.15.0", "not to be had"),
        ("ERROR: HTTPSConnectionPool(host='x'): Max retries exceeded", "cannot be reached"),
        ("ERROR: something new", "pip failed: ERROR: something new"),
    ],
)
def test_pips_failure_becomes_a_sentence(
    pip_says: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bootstrap.run_pip(["sh", "-c", f'echo "{pip_says}" >&2; exit 1'])
    assert end.value.code == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("Error: ")
    assert sentence in last_line


def test_too_little_disk_is_said_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        bootstrap.check_disk(gigabytes=1e9)
    assert "GB are free here" in capsys.readouterr().err


def test_a_finished_installation_is_found_at_once() -> None:
    result = subprocess.run(
        [sys.executable, "scripts/bootstrap.py"], capture_output=True, text=True, check=True
    )
    assert result.stdout == ""


def test_an_old_python_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    with pytest.raises(SystemExit):
        bootstrap.main()
    assert "Python 99.0 or newer is needed, this is 3." in capsys.readouterr().err
