"""Installing: what uv is called with, and when. That uv installs it is seen on each fresh clone."""

import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture
def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that installs groups and returns the calls of Python, pip and uv."""

    def called(*groups: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["bootstrap.py", *groups])
        bootstrap.main()
        calls = (folder / ".venv/calls").read_text().splitlines()
        return [call for call in calls if "import sys, pip" not in call]

    return called


def test_an_up_to_date_group_starts_no_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "run"])
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    bootstrap.main()
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
    install: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror")
    # Or main() would leave it in the environment of the next tests.
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://mirror")
    (folder / "requirements/run.lock").write_text(LOCK + "b==7\n")
    assert install("run", "batch") == [
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
    install: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://me:secret@here"
    bootstrap.TORCH_BUILD.unlink()
    bootstrap.stamp_of("pytorch").unlink()
    monkeypatch.setenv("TORCH_INDEX", url)
    created = []
    monkeypatch.setattr(bootstrap, "is_usable", lambda: True)
    execute = bootstrap.execute
    monkeypatch.setattr(
        bootstrap,
        "execute",
        lambda *c: created.append(c) if "venv" in c else execute(*c),
    )
    assert install("pytorch") == [
        f" {UV} {REINSTALL} --default-index {url} -r .venv/torch.txt",
        f" {UV} {BY_HASH} .venv/without-torch.txt",
    ]
    assert not created
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
def test_a_new_driver_or_another_index_means_another_pytorch_in_the_same_environment(
    installed: str, torch_index: str, driver: bool, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.TORCH_BUILD.write_text(installed)
    monkeypatch.setenv("TORCH_INDEX", torch_index)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: driver)
    executed: list[str] = []
    monkeypatch.setattr(bootstrap, "execute", lambda *c: executed.append(" ".join(c)))
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "run"])
    bootstrap.main()
    assert not executed  # without PyTorch its build does not matter
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "pytorch"])
    bootstrap.main()
    assert [REINSTALL in command for command in executed[:1]] == [True] * new
    assert not any("venv --clear" in command for command in executed)


def test_a_group_brings_those_that_it_needs(
    folder: Path, install: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "requirements/timm.lock").write_text("timm==1")
    bootstrap.stamp_of("pytorch").unlink()
    assert [call.rpartition(" ")[2] for call in install("timm")] == [
        "requirements/pytorch.lock",
        "requirements/timm.lock",
    ]
    assert "pytorch, up to 3000 and 5500 MB to download and on disk" in capsys.readouterr().out


@pytest.mark.slow
def test_an_incomplete_environment_is_not_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not bootstrap.is_usable()
    bootstrap.execute(sys.executable, "-m", "venv", "--clear", ".venv")
    assert bootstrap.is_usable()
    for pip in Path(".venv").glob("lib/python*/site-packages/pip"):
        shutil.rmtree(pip)
    assert not bootstrap.is_usable()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lock's build has no CUDA")
@pytest.mark.usefixtures("folder")
def test_the_cpu_build_is_chosen_if_its_index_answers_and_there_is_no_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(bootstrap, "CPU_INDEX", f"http://127.0.0.1:{server.server_port}/")
        assert bootstrap.choose_torch_build() == "cpu"
        monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: True)
        assert bootstrap.choose_torch_build() == "locked"
        server.shutdown()
        thread.join()
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: False)
    assert bootstrap.choose_torch_build() == "locked"


def test_a_group_that_could_not_be_installed_is_installed_next_time(folder: Path) -> None:
    (folder / ".venv/fails").touch()
    with pytest.raises(SystemExit, match="not installed, for the reason above"):
        bootstrap.install("run", "locked")
    assert not bootstrap.is_installed("run")


def test_an_old_python_makes_no_environment_and_uses_one_that_is_there(
    folder: Path, install: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    (folder / "requirements/run.lock").write_text(LOCK + "b==7\n")
    assert f" {PIP.format(folder / '.venv')}" in install("run")
    (folder / ".venv/bin/python").unlink()
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer is required"):
        install("run")


def test_another_python_neither_removes_nor_reinstalls_an_environment_that_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version", "3.99 of another PATH")
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "run"])
    monkeypatch.setattr(bootstrap, "execute", lambda *c: pytest.fail(f"started {c}"))
    bootstrap.main()
    # An upgrade of the system may have replaced the Python that .venv uses.
    (folder / ".venv/bin/python").rename(folder / "python3.99")
    (folder / ".venv/bin/python").symlink_to(folder / "python3.99")
    assert not bootstrap.is_installed("run")
    assert bootstrap.is_usable()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *((name, False) for name in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_CONSTRAINT")),
        *((name, False) for name in ("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_SYSTEM_PYTHON")),
        *((name, False) for name in ("PYTHONPATH", "PYTHONHOME", "PIP_REQUIRE_VIRTUALENV")),
        *((name, False) for name in ("UV_NO_BUILD", "PIP_NO_BINARY", "UV_OVERRIDE")),
        *((name, True) for name in ("PIP_INDEX_URL", "PIP_CERT", "UV_DEFAULT_INDEX", "UV_OFFLINE")),
        *((name, True) for name in ("SSL_CERT_FILE", "HTTPS_PROXY", "UV_CACHE_DIR")),
    ],
)
def test_setup_keeps_settings_of_indexes_and_certificates_only(
    name: str, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, "given")
    bootstrap.execute("sh", "-c", f"printenv {name} >{tmp_path}/value || true")
    assert ((tmp_path / "value").read_text() == "given\n") == kept


@pytest.mark.slow
def test_pips_configuration_for_other_environments_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bootstrap.create()
    wheel = tmp_path / "tool-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("tool.py", "")
        content.writestr(
            "tool-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tool\nVersion: 1"
        )
        content.writestr("tool-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        content.writestr("tool-1.dist-info/RECORD", "")
    prefix = f"--prefix={tmp_path / '.venv'}"
    for setting in ("user = true", "target = elsewhere", "prefix = elsewhere", "constraint = gone"):
        (tmp_path / "pip.conf").write_text(f"[install]\n{setting}\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
        monkeypatch.setenv("PIP_FORCE_REINSTALL", "1")
        bootstrap.execute(str(bootstrap.PYTHON), *bootstrap.PIP, prefix, str(wheel))
        (module,) = tmp_path.glob(".venv/lib/python*/site-packages/tool.py")
        module.unlink()
        assert not (tmp_path / "elsewhere").exists()


def test_a_moved_or_copied_project_has_its_own_client_and_programs(folder: Path) -> None:
    packages = folder / ".venv/lib/python3.10/site-packages"
    packages.mkdir(parents=True)
    (packages / "classification_client.pth").write_text("/where/it/was/client")
    bootstrap.install("run", "")
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


def test_make_passes_the_index_on_unchanged() -> None:
    url = 'http://me:it\'s"secret" @127.0.0.1/cpu'
    done = subprocess.run(
        ["make", "setup", f"TORCH_INDEX={url}", "PYTHON=printenv TORCH_INDEX; :"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{url}\n"
