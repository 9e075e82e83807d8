"""Installing: what uv is called with, and when. Each fresh clone shows that uv installs it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from scripts import bootstrap

LOCK = """\
uv==6 \\
    --hash=sha256:6
"""
PYTORCH_LOCK = """\
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
"""
# Stands for both Python and uv: writes down what it is called with.
PROGRAM = """\
#!/bin/sh
echo "$UV_DEFAULT_INDEX $@" >>.venv/calls
test ! -e .venv/fails
"""
PIP = (
    "-m pip --disable-pip-version-check --quiet install --target= --prefix={} "
    "--require-hashes -r .venv/uv.txt"
)
UV = "pip install --python .venv/bin/python --no-deps"
REINSTALL = "--reinstall-package=torch --reinstall-package=torchvision"
BY_HASH = "--require-hashes --build-constraints requirements/run.lock -r"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project in which the run group is installed."""
    monkeypatch.chdir(tmp_path)
    for name in ("TORCH_INDEX", "PIP_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: False)
    for name in (".venv/bin", "requirements", "client"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("python", "uv"):
        (tmp_path / ".venv/bin" / name).write_text(PROGRAM)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    (tmp_path / "requirements/run.lock").write_text(LOCK)
    (tmp_path / "requirements/pytorch.lock").write_text(PYTORCH_LOCK)
    (tmp_path / "requirements/batch.lock").write_text("tool==1")
    (tmp_path / "client/pyproject.toml").write_text("version = 1")
    (tmp_path / "pyproject.toml").write_text(
        "requirements/batch.in requirements/pytorch.in requirements/timm.in requirements/run.in"
    )
    (tmp_path / ".venv/torch").write_text("locked")
    for group in ("run", "pytorch"):
        (tmp_path / f".venv/installed-{group}").write_text(bootstrap.fingerprint(group))
    return tmp_path


Run = Callable[..., list[str]]


@pytest.fixture
def run_bootstrap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that installs groups and returns the calls of Python, pip and uv."""

    def run(*groups: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["bootstrap.py", *groups])
        bootstrap.main()
        log = folder / ".venv/calls"
        calls = log.read_text().splitlines() if log.exists() else []
        return [call for call in calls if "import sys, pip" not in call]

    return run


def test_an_up_to_date_group_starts_no_process(
    folder: Path, run_bootstrap: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert run_bootstrap("run") == []
    for changed in ("requirements/run.lock", "client/pyproject.toml", ".venv/installed-run"):
        before = (folder / changed).read_text()
        (folder / changed).write_text(before + "#")
        assert not bootstrap.is_installed("run"), changed
        (folder / changed).write_text(before)
    assert bootstrap.is_installed("run")
    (folder / ".venv/bin/python").unlink()
    assert not bootstrap.is_installed("run")


def test_each_group_is_installed_from_its_lock_by_hash(
    folder: Path,
    run_bootstrap: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror")
    (folder / "requirements/run.lock").write_text(LOCK + "b==7\n")
    assert run_bootstrap("run", "batch") == [
        f"http://mirror {PIP.format(folder / '.venv')}",
        f"http://mirror {UV} {BY_HASH} requirements/run.lock",
        f"http://mirror {UV} --offline --editable client",
        f"http://mirror {UV} {BY_HASH} requirements/batch.lock",
    ]
    assert bootstrap.is_installed("run")
    assert bootstrap.is_installed("batch")
    assert "batch, up to 300 and 800 MB to download and on disk" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_another_pytorch_build_has_the_locks_versions_without_hashes_and_cuda(
    run_bootstrap: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://me:secret@here"
    bootstrap.TORCH_BUILD.unlink()
    bootstrap.stamp_of("pytorch").unlink()
    monkeypatch.setenv("TORCH_INDEX", url)
    monkeypatch.setattr(bootstrap, "create", lambda: pytest.fail("it has an environment"))
    assert run_bootstrap("pytorch") == [
        f" {UV} {REINSTALL} --default-index {url} -r .venv/torch.txt",
        f" {UV} {BY_HASH} .venv/without-torch.txt",
    ]
    assert Path(".venv/torch.txt").read_text().split() == ["torch==3", "torchvision==4"]
    others = PYTORCH_LOCK[: PYTORCH_LOCK.index("torch==")]
    assert Path(".venv/without-torch.txt").read_text() == others
    assert bootstrap.TORCH_BUILD.read_text() == url
    assert bootstrap.TORCH_BUILD.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("installed", "torch_index", "driver", "new"),
    [
        ("locked", "", True, False),
        ("cpu", "", False, False),
        ("cpu", "", True, True),
        ("http://a", "http://a", True, False),
        ("http://a", "http://b", False, True),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_new_driver_or_another_index_replaces_pytorch_only(
    installed: str,
    torch_index: str,
    driver: bool,
    new: bool,
    run_bootstrap: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bootstrap.TORCH_BUILD.write_text(installed)
    monkeypatch.setenv("TORCH_INDEX", torch_index)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(bootstrap, "create", lambda: pytest.fail("it has an environment"))
    assert run_bootstrap("run") == []  # without PyTorch its build does not matter
    assert [REINSTALL in call for call in run_bootstrap("pytorch")[:1]] == [True] * new


def test_a_group_brings_those_that_it_needs(
    folder: Path, run_bootstrap: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "requirements/timm.lock").write_text("timm==1")
    bootstrap.stamp_of("pytorch").unlink()
    assert [call.rpartition(" ")[2] for call in run_bootstrap("timm")] == [
        "requirements/pytorch.lock",
        "requirements/timm.lock",
    ]
    assert "pytorch, up to 3000 and 5500 MB to download and on disk" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lock's build has no CUDA")
@pytest.mark.usefixtures("folder")
def test_the_cpu_build_is_chosen_if_its_index_answers_and_there_is_no_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = MagicMock()
    index.return_value.__enter__.return_value.status = index.return_value.status = 200
    monkeypatch.setattr("urllib.request.urlopen", index)
    assert bootstrap.choose_torch_build() == "cpu"
    index.side_effect = OSError("unreachable")
    assert bootstrap.choose_torch_build() == "locked"
    index.side_effect = None
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: True)
    assert bootstrap.choose_torch_build() == "locked"


def test_a_group_that_could_not_be_installed_is_installed_next_time(folder: Path) -> None:
    (folder / ".venv/fails").touch()
    with pytest.raises(SystemExit, match="not installed, for the reason above"):
        bootstrap.install("run")
    assert not bootstrap.is_installed("run")


def test_an_old_python_makes_no_environment_and_uses_one_that_is_there(
    folder: Path, run_bootstrap: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    (folder / "requirements/run.lock").write_text(LOCK + "b==7\n")
    assert f" {PIP.format(folder / '.venv')}" in run_bootstrap("run")
    (folder / ".venv/bin/python").unlink()
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer is required"):
        run_bootstrap("run")


FOREIGN = """
    PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT UV_CONSTRAINT UV_BUILD_CONSTRAINT UV_SYSTEM_PYTHON
    PYTHONPATH PYTHONHOME PIP_REQUIRE_VIRTUALENV UV_NO_BUILD PIP_NO_BINARY UV_OVERRIDE
    PIP_DRY_RUN UV_EXCLUDE_NEWER
"""
KEPT = """
    PIP_INDEX_URL PIP_CERT UV_DEFAULT_INDEX UV_OFFLINE SSL_CERT_FILE HTTPS_PROXY UV_CACHE_DIR
"""


def test_setup_keeps_settings_of_indexes_and_certificates_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FOREIGN + KEPT).split():
        monkeypatch.setenv(name, "given")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    (folder / "uv").mkdir()
    (folder / "uv/uv.toml").write_text(
        'constraint-dependencies = [\n  "six<1",\n]\nnative-tls = true\n[[index]]\nurl = "mirror"\n'
        '[pip]\ntarget = "elsewhere"\nindex-strategy = "first-index"\n'
    )
    bootstrap.execute("sh", "-c", "printenv >.venv/variables")
    lines = (folder / ".venv/variables").read_text().splitlines()
    assert {line[:-6] for line in lines if line.endswith("=given")} == set(KEPT.split())
    # Variables override pip's configuration files.
    assert {"PIP_DRY_RUN=0", "PIP_USER=0", "UV_CONFIG_FILE=.venv/uv.toml"} <= set(lines)
    assert (folder / ".venv/uv.toml").read_text() == (
        'native-tls = true\n[[index]]\nurl = "mirror"\n[pip]\nindex-strategy = "first-index"\n'
    )


def test_a_moved_project_uses_its_own_client(folder: Path) -> None:
    packages = folder / ".venv/lib/python3.10/site-packages"
    packages.mkdir(parents=True)
    (packages / "classification_client.pth").write_text("/where/it/was/client")
    bootstrap.install("run")
    client = (packages / "classification_client.pth").read_text().strip()
    assert (packages / client).resolve() == folder / "client"


def test_ctrl_c_exits_with_a_message_and_the_next_run_resumes(folder: Path) -> None:
    (folder / "scripts").mkdir()
    shutil.copy(bootstrap.__file__, folder / "scripts")
    (folder / ".venv/installed-batch").write_text(bootstrap.fingerprint("batch"))
    (folder / "requirements/batch.lock").write_text("tool==2")
    (folder / ".venv/bin/uv").write_text("#!/bin/sh\necho >started\nexec sleep 60\n")
    with subprocess.Popen(
        [sys.executable, "scripts/bootstrap.py", "batch"],
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
    assert "Stopped by Ctrl-C. Run the same command again to resume." in errors
    (folder / "requirements/batch.lock").write_text("tool==1")
    assert not bootstrap.is_installed("batch")
