"""The gateway behind another proxy, here a second nginx."""

import http.client
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests

from scripts.gateway import nginx
from scripts.gateway.options import Options
from scripts.gateway.template import has_ipv6
from scripts.samples import CAT
from scripts.serve.running import ServerState, unused_ports
from tests.gateway.cluster import Gateway, gateway, in_front_of, wait_for
from tests.gateway.conftest import KEYS, write_keys

_PROXY = """
user root;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  client_max_body_size 0;
  large_client_header_buffers 4 32k;
  upstream gateway {{
    server 127.0.0.1:{gateway};
    keepalive 1;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateway;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host images.example.com;
      proxy_set_header X-Forwarded-For $http_x_test_client;
      proxy_set_header X-Forwarded-Proto $http_x_test_proto;
    }}
  }}
}}
"""


@contextmanager
def proxy(gateway_port: int, folder: Path) -> Iterator[str]:
    """Run a second nginx in front of the gateway; yield its address."""
    (port,) = unused_ports(1)
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(_PROXY.format(folder=folder, port=port, gateway=gateway_port))
    command = nginx.nginx_command(config, folder, "-g", "daemon off;")
    with subprocess.Popen(command) as process:
        try:
            wait_for((folder / "nginx.pid").exists)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def public(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A public gateway that trusts a proxy on loopback."""
    folder = tmp_path_factory.mktemp("public")
    keys = str(write_keys(folder, KEYS))
    options = in_front_of(running, keys=keys, proxies="127.0.0.1", keepalive=620)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Options, "is_loopback", False)
            started = stack.enter_context(gateway(options, folder / "gateway"))
        yield started


def _predict(url: str, key: str = KEYS["alice"], **headers: str) -> requests.Response:
    headers = {"X-API-Key": key, "X-Test-Proto": "https", **headers}
    return requests.post(
        f"{url}/predict",
        data=CAT.read_bytes(),
        headers=headers,
        timeout=60,
        allow_redirects=False,
    )


def test_the_scheme_of_a_trusted_proxy_is_used(public: Gateway, tmp_path: Path) -> None:
    with proxy(public.options.http_port, tmp_path / "proxy") as url:
        for reported in ("https", "HTTPS, http"):
            served = _predict(url, **{"X-Test-Proto": reported})
            assert served.json()["success"] is True
            assert "strict-transport-security" in served.headers
        plain = _predict(url, **{"X-Test-Proto": "http"})
        assert plain.status_code == 308
        assert plain.headers["location"].startswith("https://images.example.com")


def test_invalid_keys_are_limited_per_client_behind_a_load_balancer(
    public: Gateway, tmp_path: Path
) -> None:
    with proxy(public.options.http_port, tmp_path / "proxy") as url:
        wrong = [
            _predict(url, "wrong-key-0123456789", **{"X-Test-Client": "192.0.2.1"}).status_code
            for _ in range(40)
        ]
        assert 429 in wrong
        other = _predict(url, "wrong-key-0123456789", **{"X-Test-Client": "192.0.2.2"})
        assert other.status_code == 401
    log = public.folder / "access.log"
    wait_for(lambda: '"address":"192.0.2.2"' in log.read_text())


def test_forwarded_headers_of_an_untrusted_client_are_ignored(
    running: ServerState, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Options, "is_loopback", False)
    options = in_front_of(running, keys=str(keys), proxies="192.0.2.0/24")
    with gateway(options, tmp_path / "public" / "gateway") as started:
        forged = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.9"}
        assert started.predict(KEYS["alice"], **forged).status_code == 308
        log = started.folder / "access.log"
        wait_for(lambda: '"address":"127.0.0.1"' in log.read_text())
        assert "192.0.2.9" not in log.read_text()


def test_a_path_prefix_is_served_and_the_web_ui_stays_below_it(
    running: ServerState, tmp_path: Path
) -> None:
    options = in_front_of(running, prefix="/classify")
    with (
        gateway(options, tmp_path / "gateway") as started,
        proxy(started.options.http_port, tmp_path / "proxy") as url,
    ):
        page = requests.get(f"{url}/classify/", headers={"Accept": "text/html"}, timeout=60)
        assert page.status_code == 200
        answer = requests.post(f"{url}/classify/predict", data=CAT.read_bytes(), timeout=60)
        assert answer.json()["success"] is True
        assert requests.post(f"{url}/predict", data=b"x", timeout=60).status_code == 404
        # Health checks need no prefix.
        assert requests.get(f"{url}/healthz", timeout=60).status_code == 200
        redirect = requests.get(f"{url}/classify", timeout=60, allow_redirects=False)
        assert redirect.headers["location"] == "/classify/"


def test_idle_connections_stay_open_longer_than_load_balancers_keep_them(
    public: Gateway, client: Gateway
) -> None:
    for started, seconds in ((public, 620), (client, 75)):
        config = (started.folder / "nginx.conf").read_text()
        assert f"keepalive_timeout {seconds}s;" in config
    connection = http.client.HTTPConnection("127.0.0.1", client.options.http_port)
    for _ in range(2):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        time.sleep(0.5)


def test_headers_of_16_kilobytes_are_accepted(client: Gateway, tmp_path: Path) -> None:
    """Identity-aware proxies of clouds send tokens of that size."""
    large = {"X-Test": "x" * 16_000, "Cookie": "c" * 16_000}
    with proxy(client.options.http_port, tmp_path / "proxy") as url:
        assert _predict(url, **large).status_code == 200
    command = ["curl", "--silent", "--http2", "--insecure", "--output", "/dev/null"]
    for name, value in large.items():
        command += ["--header", f"{name}: {value}"]
    url = f"https://127.0.0.1:{client.options.https_port}/healthz"
    shown = subprocess.check_output([*command, "--write-out", "%{http_code} %{http_version}", url])
    assert shown == b"200 2"


def test_expect_100_continue_is_answered_before_the_body(client: Gateway) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {CAT.stat().st_size}\r\n"
    with socket.create_connection(("127.0.0.1", client.options.http_port), 60) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(CAT.read_bytes())
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("host", "addresses"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])]
)
def test_ipv6_is_served(
    running: ServerState, keys: Path, tmp_path: Path, host: str, addresses: list[str]
) -> None:
    if not has_ipv6():
        pytest.skip("NOT RUN: this machine has no IPv6")
    options = in_front_of(running, host=host, published="::1", keys=str(keys))
    with gateway(options, tmp_path / "gateway"):
        for address in addresses:
            url = f"http://{address}:{options.http_port}/healthz"
            assert requests.get(url, timeout=60).status_code == 200
