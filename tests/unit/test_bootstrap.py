"""Installing: what uv is asked for, and when. That uv does it is seen on each fresh clone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import bootstrap

LOCK = """\
a==1 ; python_version < '3.11' \\
    --hash=sha256:0
a==2 ; python_version >= '3.11' \\
    --hash=sha256:1
torch==3 \\
    --hash=sha256:2 \\
    --hash=sha256:3
torchvision==4 \\
    --hash=sha256:4
nvidia-cublas==5 \\
    --hash=sha256:5
uv==6 \\
    --hash=sha256:6
"""
UV = """\
#!/bin/sh
echo "$UV_DEFAULT_INDEX $@" >>.venv/asked
case "$*" in *--dry-run*) echo ' + torch==3';; *) test ! -e .venv/fails;; esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which running is installed, as far as can be seen without starting it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: False)
    (tmp_path / ".venv/lib/python3/site-packages/uv-6.dist-info").mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir()
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/bin/uv").write_text(UV)
    (tmp_path / ".venv/bin/uv").chmod(0o755)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/tests.lock").write_text("tool==1")
    (tmp_path / "client").mkdir()
    (tmp_path / "client/pyproject.toml").write_text("version = 1")
    (tmp_path / "requirements/run.lock").write_text(LOCK)
    (tmp_path / ".venv/installed-run").write_text(bootstrap.fingerprint("run"))
    return tmp_path


def test_a_finished_installation_is_found_without_starting_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "run"])
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    bootstrap.main()
    for changed in ("requirements/run.lock", "client/pyproject.toml", ".venv/installed-run"):
        before = (folder / changed).read_text()
        (folder / changed).write_text(before + "#")
        assert not bootstrap.is_installed("run"), changed
        (folder / changed).write_text(before)
    assert bootstrap.is_installed("run")
    (folder / ".venv/bin/python").unlink()
    assert not bootstrap.is_installed("run")


@pytest.mark.slow
def test_an_environment_whose_python_does_not_start_is_made_again(folder: Path) -> None:
    assert bootstrap.works()
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    (folder / ".venv/bin/python").chmod(0o755)
    assert not bootstrap.works()
    bootstrap.make_venv()
    assert bootstrap.works()
    assert not bootstrap.is_installed("run")


@pytest.mark.parametrize(
    ("before", "now", "another"),
    [
        (None, "", False),
        ("locked", "", False),
        ("locked", "driver", False),
        ("cpu", "", False),
        ("cpu", "driver", True),
        ("http://a", "driver", False),
        ("http://a", "http://a", False),
        ("http://a", "http://b", True),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_new_driver_or_another_index_means_another_environment(
    before: str | None,
    now: str,
    another: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if before is not None:
        bootstrap.CHOICE.write_text(before)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: now == "driver")
    assert bootstrap.is_another(now.replace("driver", "")) is another


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the pinned build has no CUDA")
@pytest.mark.usefixtures("folder")
def test_the_cpu_build_is_taken_if_its_index_answers_and_there_is_no_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bootstrap, "PROBE_SECONDS", 2)
    for command, chosen in (("true", "cpu"), ("false", "locked"), ("sleep 60", "locked")):
        asking = ["sh", "-c", command]
        monkeypatch.setattr(bootstrap, "uv_install", lambda *_, asking=asking: asking)
        assert bootstrap.choose() == chosen, command
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(bootstrap, "uv_install", lambda *_: ["true"])
    assert bootstrap.choose() == "locked"


def test_groups_are_installed_by_hash_each_from_its_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "run", "tests"])
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    bootstrap.CHOICE.write_text("locked")
    (folder / "requirements/run.lock").write_text(LOCK + "b==7\n")
    install = "http://mirror pip install --python .venv/bin/python --no-deps"
    by_hash = "--require-hashes --build-constraints requirements/run.lock -r"
    bootstrap.main()
    assert (folder / ".venv/asked").read_text().splitlines() == [
        f"{install} --dry-run {by_hash} requirements/run.lock",
        "http://mirror cache dir",
        f"{install} {by_hash} requirements/run.lock",
        f"{install} --quiet --offline --editable client",
        f"{install} --dry-run {by_hash} requirements/tests.lock",
        "http://mirror cache dir",
        f"{install} {by_hash} requirements/tests.lock",
    ]
    assert bootstrap.is_installed("run")
    assert bootstrap.is_installed("tests")


def test_pytorch_from_an_index_has_the_locks_version_without_hashes_and_without_cuda(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "run"])
    monkeypatch.setenv("TORCH_INDEX", "http://me:secret@here")
    (folder / ".venv/installed-run").unlink()
    bootstrap.main()
    assert bootstrap.CHOICE.read_text() == "http://me:secret@here"
    assert bootstrap.CHOICE.stat().st_mode & 0o077 == 0
    asked = (folder / ".venv/asked").read_text()
    assert "--no-deps --default-index http://me:secret@here -r .venv/torch.txt\n" in asked
    assert "--require-hashes --build-constraints requirements/run.lock -r .venv/without" in asked
    assert (folder / ".venv/torch.txt").read_text().split() == ["torch==3", "torchvision==4"]
    others = (folder / ".venv/without-torch.txt").read_text()
    assert others == LOCK[: LOCK.index("torch==")] + LOCK[LOCK.index("uv==") :]


def test_a_group_that_uv_could_not_install_is_installed_next_time(folder: Path) -> None:
    (folder / ".venv/fails").touch()
    with pytest.raises(SystemExit, match="1"):
        bootstrap.install("tests", "locked")
    assert not bootstrap.is_installed("tests")


def test_what_keeps_from_installing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "least_free", lambda: (5.0, Path("/disk")))
    with pytest.raises(SystemExit):
        bootstrap.announce("run", "running", ["torch", "nvidia-a"])
    with pytest.raises(SystemExit):
        bootstrap.blame("uv")
    monkeypatch.setattr(bootstrap, "FULL_GIGABYTES", 9)
    with pytest.raises(SystemExit):
        bootstrap.blame("uv")
    monkeypatch.setattr(bootstrap, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(SystemExit, match="1"):
        bootstrap.main()
    too_large, failed, full, old = capsys.readouterr().err.splitlines()
    assert "Only 5.0 GB are free on the disk of /disk, and the packages need up to" in too_large
    assert "uv could not install the packages, for the reason above" in failed
    assert "The disk of /disk is full" in full
    assert "Error: Python 99.0 or newer is needed, this is 3." in old


def test_ctrl_c_is_answered_in_a_sentence(folder: Path) -> None:
    (folder / "scripts").mkdir()
    shutil.copy(bootstrap.__file__, folder / "scripts")
    (folder / ".venv/installed-run").unlink()
    (folder / ".venv/torch").write_text("locked")
    (folder / ".venv/bin/uv").write_text("#!/bin/sh\necho >started\nexec sleep 60\n")
    with subprocess.Popen(
        [sys.executable, "scripts/bootstrap.py", "run"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not (folder / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "Stopped by Ctrl-C. Run the same command again to go on." in errors


def test_make_hands_the_index_on_as_it_is() -> None:
    address = 'http://me:it\'s"secret" @127.0.0.1/cpu'
    done = subprocess.run(
        ["make", "setup", f"TORCH_INDEX={address}", "PYTHON=printenv TORCH_INDEX; :"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{address}\n"
