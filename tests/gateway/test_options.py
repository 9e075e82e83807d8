"""The checks before a gateway starts, and its commands; without TorchServe."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
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
from scripts.serve.preflight import check_ports
from scripts.state import write_state
from scripts.terminal import UserError
from tests.gateway.cluster import TIMEOUT, free_options, gateway

UPSTREAM = {"upstreams": "127.0.0.1:9"}


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


def test_a_port_in_use_is_rejected_with_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"{port}.*already in use.*HTTPS_PORT"):
            check_ports("127.0.0.1", {"https": port})


def test_upstreams_may_be_ipv6_addresses() -> None:
    assert read_upstreams("[::1]:80 10.0.0.7:8080") == [("[::1]", 80), ("10.0.0.7", 8080)]


def test_a_single_host_name_is_resolved_per_request_and_several_are_balanced(
    tmp_path: Path,
) -> None:
    options = Options(model="m")
    named = render(options, tmp_path, [("densenet", 8080)])
    assert "default densenet:8080;" in named
    assert "resolver " in named
    balanced = render(options, tmp_path, [("10.0.0.7", 8080), ("10.0.0.8", 8080)])
    assert "resolver " not in balanced
    assert "server 10.0.0.8:8080 max_fails=0;" in balanced


def test_the_template_rejects_a_missing_value() -> None:
    with pytest.raises(UndefinedError):
        template.render_template(folder="/x")


def test_a_gateway_whose_run_folder_was_removed_can_be_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "gateway"
    nginx.start(free_options(**UPSTREAM), folder)
    shutil.rmtree(folder)
    assert nginx.find(tmp_path / "other") is None
    assert nginx.find(folder) is not None
    assert nginx.stop(folder)
    assert nginx.find(folder) is None


def test_an_upgrade_without_a_running_gateway_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gateway has run, or one has stopped and left its state."""
    monkeypatch.setattr(module_upgrade, "require_running", lambda _: None)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"gateway is not running\. Start it with: make gateway"
        ):
            module_upgrade.upgrade(tmp_path / "new.mar", folder=tmp_path / "gateway")
        write_state(tmp_path / "gateway" / nginx.STATE, dataclasses.asdict(Options()))


@pytest.mark.skipif(not template.has_ipv6(), reason="NOT RUN: this machine has no IPv6")
def test_localhost_is_served_at_both_of_its_addresses(tmp_path: Path) -> None:
    with gateway(free_options(**UPSTREAM), tmp_path / "gateway") as started:
        for address in ("127.0.0.1", "[::1]"):
            url = f"http://{address}:{started.options.http_port}/healthz"
            assert requests.get(url, timeout=TIMEOUT).status_code == 200


def test_the_gateways_folder_may_have_a_non_ascii_path(tmp_path: Path) -> None:
    """Also in the C locale, in which Python cannot decode it."""
    folder = tmp_path / "my prüfung-分類" / "gateway"
    code = (
        "import sys; from pathlib import Path; from scripts.gateway import nginx\n"
        "from tests.gateway.cluster import free_options\n"
        "folder = Path(sys.argv[1])\n"
        "nginx.start(free_options(upstreams='127.0.0.1:9'), folder)\n"
        "assert nginx.stop(folder)"
    )
    c = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, folder], env=os.environ | c, check=True)
    assert (folder / "error.log").exists()


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


def test_stored_options_of_another_version_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "gateway"
    with gateway(free_options(**UPSTREAM), folder):
        assert nginx.read_options(folder).upstreams == UPSTREAM["upstreams"]
        (folder / nginx.STATE).write_text('{"nodes": 2}')
        with pytest.raises(UserError, match="is unreadable"):
            nginx.read_options(folder)
