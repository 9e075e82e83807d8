"""The checks before a gateway starts, and its commands; without TorchServe."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from jinja2 import UndefinedError

from scripts.gateway import nginx, template
from scripts.gateway import options as module
from scripts.gateway import upgrade as module_upgrade
from scripts.gateway.config import render
from scripts.gateway.options import Options, check, read_upstreams
from scripts.state import write_state
from scripts.terminal import UserError
from tests.gateway.cluster import (
    TIMEOUT,
    Gateway,
    error,
    free_options,
    gateway,
    wait_for,
    write_keys,
)
from tests.gateway.conftest import KEYS

UPSTREAM = {"upstreams": "127.0.0.1:9"}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with API keys whose upstream does not exist: valid keys get 503."""
    folder = tmp_path_factory.mktemp("idle")
    options = free_options(keys=write_keys(folder, KEYS), **UPSTREAM)
    with gateway(options, folder / "gateway") as started:
        yield started


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0}, "RATE must be 1 or more, got 0"),
        ({"burst": -3}, "BURST must be 1 or more, got -3"),
        ({"connections": 0}, "CONNECTIONS must be 1 or more, got 0"),
        ({"keepalive": 0}, "KEEPALIVE must be 1 or more, got 0"),
        ({"timeout": 5}, "TIMEOUT must be 10 or more, got 5"),
        ({"model": "a; evil"}, "MODEL must be letters"),
        ({"host": "localhost"}, "HOST must be an IP address"),
        ({"host": "192.0.2.1"}, r"192\.0\.2\.1 is not a loopback address: others could use"),
        ({"host": "0.0.0.0"}, r"0\.0\.0\.0 is not a loopback address"),
        ({"host": "127.0.0.1", "published": "192.0.2.1"}, r"192\.0\.2\.1 is not a loopback"),
        ({"published": "all"}, "PUBLISHED must be an IP address"),
        ({"host": "192.0.2.1", "keys": "keys"}, "keys cannot be read"),
        ({"certificate": "a.pem"}, "belong together"),
        ({"certificate": "a.pem", "certificate_key": "a.key"}, "a.pem is not a file"),
        ({"certificate": __file__, "certificate_key": __file__}, "not a certificate and its priv"),
        ({"proxies": "10.0.0.0/8 balancer"}, "PROXIES must be addresses or networks: 'balancer'"),
        ({"prefix": "classify"}, "PREFIX must be a path such as /classify"),
        ({"prefix": "/a b"}, "PREFIX must be a path"),
        ({"log": "nowhere"}, "LOG must be file, stdout or syslog"),
        ({"upstreams": "densenet"}, "HOST:PORT"),
        ({"upstreams": "densenet:0"}, "HOST:PORT"),
        ({"upstreams": "densenet:99999"}, "HOST:PORT"),
        ({"upstreams": "http://densenet:8080"}, "HOST:PORT"),
        ({"upstreams": "a:1 ;evil:2"}, "HOST:PORT"),
    ],
)
def test_an_invalid_option_is_rejected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(Options(), **wrong))


def test_a_container_whose_ports_are_published_on_loopback_needs_no_keys() -> None:
    check(Options(host="0.0.0.0", published="127.0.0.1"))


def test_without_ipv6_an_ipv6_host_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_ipv6", lambda: False)
    with pytest.raises(UserError, match="this machine has no IPv6"):
        check(Options(host="::1"))


def test_a_single_host_name_is_resolved_per_request_and_several_are_balanced(
    tmp_path: Path,
) -> None:
    options = Options(model="m")
    named = render(options, tmp_path, ["densenet:8080"])
    assert "proxy_pass http://densenet:8080$target;" in named
    assert "resolver " in named
    addresses = read_upstreams("10.0.0.7:8080 [::1]:8080")
    for upstreams in (addresses, addresses[1:]):
        balanced = render(options, tmp_path, upstreams)
        assert "resolver " not in balanced
        assert "server [::1]:8080 max_fails=0;" in balanced


def test_the_template_rejects_a_missing_value() -> None:
    with pytest.raises(UndefinedError):
        template.render_template(folder="/x")


def test_an_upgrade_without_a_running_gateway_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gateway has run, or one has stopped and left its state."""
    monkeypatch.setattr(module_upgrade, "require_running", lambda _: None)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"gateway is not running\. Start it with: make gateway"
        ):
            module_upgrade.upgrade(tmp_path / "new.mar", folder=tmp_path)
        write_state(tmp_path / nginx.STATE, dataclasses.asdict(Options()))


@pytest.mark.skipif(not template.has_ipv6(), reason="NOT RUN: this machine has no IPv6")
@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        # Some clients resolve localhost to the second one.
        ("127.0.0.1", ["127.0.0.1", "[::1]"]),
        ("::1", ["[::1]"]),
        ("::", ["[::1]", "127.0.0.1"]),
    ],
)
def test_ipv4_and_ipv6_are_served(tmp_path: Path, host: str, addresses: list[str]) -> None:
    options = free_options(host=host, published="::1", **UPSTREAM)
    with gateway(options, tmp_path / "gateway"):
        for address in addresses:
            url = f"http://{address}:{options.http_port}/healthz"
            assert requests.get(url, timeout=TIMEOUT).status_code == 200


def test_the_gateways_folder_may_have_a_non_ascii_path_and_be_removed(tmp_path: Path) -> None:
    """Also in the C locale, in which Python cannot decode it."""
    folder = tmp_path / "my prüfung-分類" / "gateway"
    code = (
        "import shutil, sys; from pathlib import Path; from scripts.gateway import nginx\n"
        "from tests.gateway.cluster import free_options\n"
        "folder = Path(sys.argv[1])\n"
        "nginx.start(free_options(upstreams='127.0.0.1:9'), folder)\n"
        "assert (folder / 'error.log').exists()\n"
        "shutil.rmtree(folder)\n"
        "assert nginx.find(folder.parent) is None\n"
        "assert nginx.stop(folder)\n"
        "assert nginx.find(folder) is None"
    )
    c = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, folder], env=os.environ | c, check=True)


def test_concurrent_reloads_are_rejected(tmp_path: Path) -> None:
    with (
        nginx.lock(tmp_path),
        pytest.raises(UserError, match="Another upgrade"),
        nginx.lock(tmp_path),
    ):
        pass


def test_without_a_server_the_gateway_neither_starts_nor_reloads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TorchServe is not running"):
        nginx.start(free_options(), tmp_path / "gateway")
    with pytest.raises(UserError, match="The gateway is not running"):
        nginx.reload(free_options(**UPSTREAM), tmp_path / "gateway")
    assert not nginx.stop(tmp_path / "gateway")


# --- A running gateway without an upstream ---


def test_without_any_upstream_clients_get_503_at_once(idle: Gateway) -> None:
    began = time.monotonic()
    answer = idle.predict(KEYS["alice"])
    assert error(answer) == (503, "ServiceUnavailable")
    assert answer.headers["retry-after"] == "1"
    assert error(idle.ask("GET", "/readyz")) == (503, "ServiceUnavailable")
    assert time.monotonic() - began < 5


def test_a_reload_rotates_a_long_log(idle: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    log, older = idle.access_log, idle.folder / "access.log.1"
    nginx.reload(idle.options, idle.folder)
    assert not older.exists()
    idle.ask("GET", "/before")
    wait_for(lambda: "/before" in log.read_text())
    monkeypatch.setattr(nginx, "_MAX_LOG_BYTES", 100)
    nginx.reload(idle.options, idle.folder)
    assert "/before" in older.read_text()
    assert log.read_text() == ""
    idle.ask("GET", "/after")
    wait_for(lambda: "/after" in log.read_text())


def test_a_reload_applies_changed_keys_unless_the_file_is_malformed(idle: Gateway) -> None:
    keys = Path(idle.options.keys)
    keys.write_text("alice alices key\n")
    with pytest.raises(UserError, match="line 1"):
        nginx.reload(idle.options, idle.folder)
    assert idle.predict(KEYS["alice"]).status_code == 503
    write_keys(keys.parent, {"zoe": "zoes-key-0123456789"})
    nginx.reload(idle.options, idle.folder)
    assert idle.predict("zoes-key-0123456789").status_code == 503
    assert idle.predict(KEYS["alice"]).status_code == 401
    assert (idle.folder / "nginx.conf").stat().st_mode & 0o077 == 0


def test_stored_options_of_another_version_are_rejected(idle: Gateway) -> None:
    assert nginx.read_options(idle.folder) == idle.options
    (idle.folder / nginx.STATE).write_text('{"nodes": 2}')
    with pytest.raises(UserError, match="is unreadable"):
        nginx.read_options(idle.folder)
