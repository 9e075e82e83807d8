"""The systemd units: checked by systemd-analyze, and on a machine that boots with them."""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from scripts import __main__ as cli
from scripts.container.engine import find_engine, with_working_runtime
from scripts.terminal import UserError
from tests.deploy.machine import (
    CLIENTS,
    TIMEOUT,
    Machine,
    kill,
    machine,
    measure,
    systemd_image,
    upgrade,
)

SYSTEMD = Path("deploy/systemd").absolute()
UNITS = ("densenet", "densenet-gateway")
# Of 10; systemd calls values up to 4.9 medium. Measured: 1.3 and 1.6.
MAX_EXPOSURE = 2.0
# Seconds, on a busy machine; docs/operate/failures.md has measurements.
MAX_RECOVERY = 60.0


def _install(script: Path, root: Path, *arguments: str) -> Path:
    """Run the install script; return the folder of the units."""
    environment = {**os.environ, "DESTDIR": str(root), "XDG_CONFIG_HOME": "/config"}
    subprocess.run([script, *arguments], env=environment, check=True)
    return root / ("config/systemd/user" if arguments else "etc/systemd/system")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the system units that the install script writes."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOT RUN: no systemd-analyze (on Debian: apt install systemd)")
    return _install(SYSTEMD / "install", tmp_path_factory.mktemp("installed"))


def _analyze(*arguments: str | Path, **variables: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("unit", UNITS)
def test_a_system_unit_is_valid_and_confined(installed: Path, unit: str) -> None:
    file = installed / f"{unit}.service"
    assert _analyze("verify", "--man=no", file) == ""
    threshold = f"--threshold={MAX_EXPOSURE * 10:.0f}"
    report = _analyze("security", "--no-pager", "--offline=yes", threshold, file)
    assert "Overall exposure level" in report


@pytest.mark.usefixtures("installed")
def test_systemd_verifies_user_units(tmp_path: Path) -> None:
    folder = _install(SYSTEMD / "install", tmp_path, "--user")
    for unit in UNITS:
        file = folder / f"{unit}.service"
        runtime = str(tmp_path)
        assert _analyze("--user", "verify", "--man=no", file, XDG_RUNTIME_DIR=runtime) == ""
        text = file.read_text()
        assert "WantedBy=default.target" in text
        root_only = r"^(User|Group|\w*Capabilit\w+|Protect\w+|Private\w+|IPAddress\w+)="
        assert not re.search(root_only, text, re.MULTILINE)


@pytest.mark.usefixtures("installed")
def test_the_projects_path_may_have_spaces(tmp_path: Path) -> None:
    project = tmp_path / "my project"
    shutil.copytree(SYSTEMD, project / "deploy/systemd")
    (project / ".venv").symlink_to(Path(".venv").absolute())
    folder = _install(project / "deploy/systemd/install", tmp_path / "root")
    for unit in UNITS:
        assert _analyze("verify", "--man=no", folder / f"{unit}.service") == ""


def test_the_options_of_the_example_environment_exist() -> None:
    example = (SYSTEMD / "environment").read_text()
    names = re.findall(r"^#?DENSENET_(\w+)=", example, re.MULTILINE)
    assert len(names) > 5
    parsed: list[Any] = [
        typer.main.get_command(cli.program(name)).commands[name]  # type: ignore[attr-defined]
        for name in ("start", "gateway")
    ]
    options = {parameter.name.upper() for command in parsed for parameter in command.params}
    assert set(names) <= options


def test_certbots_hook_copies_the_certificate_and_reloads_the_gateway(tmp_path: Path) -> None:
    lineage, copies, programs = (tmp_path / name for name in ("live", "tls", "bin"))
    for folder in (lineage, programs):
        folder.mkdir()
    (tmp_path / "privkey1.pem").write_text("new key")
    (lineage / "privkey.pem").symlink_to("../privkey1.pem")
    (lineage / "fullchain.pem").write_text("new certificate")
    systemctl = programs / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho $* >>{tmp_path}/calls\n")
    systemctl.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RENEWED_LINEAGE": str(lineage),
        "FOLDER": str(copies),
        "GROUP": str(os.getgid()),
    }
    for _ in range(2):
        subprocess.run([SYSTEMD / "certbot-deploy-hook"], env=environment, check=True)
    contents = {path.name: path.read_text() for path in copies.iterdir()}
    assert contents == {"fullchain.pem": "new certificate", "privkey.pem": "new key"}
    assert {path.stat().st_mode & 0o777 for path in copies.iterdir()} == {0o640}
    assert not (copies / "privkey.pem").is_symlink()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["try-reload-or-restart densenet-gateway.service"] * 2


# --- A machine that boots ---


@pytest.fixture(scope="module")
def booted(lite0_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the installed service."""
    found = find_engine()
    if found is None or found.program != "podman" or os.geteuid() != 0:
        pytest.skip("NOT RUN: systemd is booted by podman as root (on Debian: apt install podman)")
    if shutil.which("ip") is None:
        pytest.skip("NOT RUN: ip is missing (on Debian: apt install iproute2)")
    folder = tmp_path_factory.mktemp("machine")
    try:
        engine = with_working_runtime(found, systemd_image(found), folder)
    except UserError as error:
        pytest.skip(f"NOT RUN: podman runs no container here: {error}")
    with machine(engine, lite0_archive, folder) as ready:
        yield ready


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("event", "allowed"),
    [
        pytest.param(kill("model_service_worker"), {"502", "503"}, id="worker"),
        pytest.param(kill("org.pytorch.serve.ModelServer"), {"502", "503"}, id="frontend"),
        pytest.param(kill("scripts start --foreground"), {"502", "503"}, id="supervisor"),
        pytest.param(kill("nginx: master"), {"refused", "ConnectionError"}, id="nginx"),
        pytest.param(upgrade, set[str](), id="upgrade"),
        pytest.param(Machine.reboot, {"refused", "ConnectionError"}, id="reboot"),
    ],
)
def test_a_machine_recovers_from_each_event(
    booted: Machine,
    event: Callable[[Machine], object],
    allowed: set[str],
    note: list[str],
    request: pytest.FixtureRequest,
) -> None:
    booted.wait_until_ready()
    at, requests = measure(booted, event)
    failed = [one for one in requests if one.outcome != "200"]
    outcomes = Counter(one.outcome for one in failed)
    slowest = max(one.end - one.begin for one in requests)
    last = max((one.begin for one in failed), default=at)
    recovered = min(one.end for one in requests if one.outcome == "200" and one.begin > last) - at
    note.append(
        f"systemd, {request.node.callspec.id}: {len(requests)} requests, {dict(outcomes)} failed, "
        f"recovered after {recovered:.1f} s, slowest {slowest:.1f} s"
    )
    assert set(outcomes) <= allowed
    # Broken connections: of a client at most the request in flight, and the one with which it
    # connects again while the last of nginx's processes exit.
    assert outcomes["ConnectionError"] <= 2 * CLIENTS
    assert all(one.retry_after for one in failed if one.outcome in {"502", "503"})
    assert slowest < TIMEOUT
    assert recovered < MAX_RECOVERY
    assert booted.shell("systemctl is-active densenet densenet-gateway") == "active\nactive"
    journal = booted.shell("journalctl --no-pager --output cat --unit densenet-gateway")
    assert '"path":"/readyz"' in journal


# certbot's folder, which only root can read.
_LIVE = "/etc/letsencrypt/live/images.example.com"
_ISSUE = f"""
umask 077; mkdir -p {_LIVE}; cd {_LIVE}
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=images.example.com \\
  -keyout privkey.pem -out fullchain.pem 2>/dev/null
RENEWED_LINEAGE={_LIVE} /opt/densenet/deploy/systemd/certbot-deploy-hook
openssl x509 -noout -fingerprint -in fullchain.pem
"""
_SERVED = """
openssl s_client -connect 127.0.0.1:443 </dev/null 2>/dev/null | openssl x509 -noout -fingerprint
"""
_USE = """
echo DENSENET_CERTIFICATE=/etc/densenet/tls/fullchain.pem >>/etc/densenet/environment
echo DENSENET_CERTIFICATE_KEY=/etc/densenet/tls/privkey.pem >>/etc/densenet/environment
systemctl restart densenet-gateway
"""
_CHALLENGE = "/.well-known/acme-challenge"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_serves_certbots_latest_certificate(booted: Machine) -> None:
    booted.wait_until_ready()
    # The files of certbot --webroot are served over plain HTTP.
    booted.shell(f"cd /var/lib/densenet/acme; mkdir -p .{_CHALLENGE}; echo proof >.{_CHALLENGE}/x")
    assert booted.shell(f"curl --silent http://127.0.0.1{_CHALLENGE}/x") == "proof"
    first = booted.shell(_ISSUE)
    booted.shell(_USE)
    booted.wait_until_ready()
    assert booted.shell(_SERVED) == first
    second = booted.shell(_ISSUE)
    assert second != first
    assert booted.shell(_SERVED) == second
