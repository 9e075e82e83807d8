"""The gateway behind a load balancer or another proxy.

One test has a second nginx in front; in the others, the clients send a proxy's headers.
"""

import http.client
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from scripts.samples import CAT
from scripts.serve.running import unused_ports
from tests.gateway.cluster import Gateway, error, wait_for
from tests.gateway.conftest import KEYS
from tests.gateway.test_access import HTTPS

_BALANCER = """
user root;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
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


@pytest.fixture
def balancer(public: Gateway, tmp_path: Path) -> Iterator[str]:
    """The address of a second nginx in front of the public gateway."""
    (port,) = unused_ports(1)
    config = tmp_path / "nginx.conf"
    config.write_text(
        _BALANCER.format(folder=tmp_path, port=port, gateway=public.options.http_port)
    )
    command = ["nginx", "-c", str(config), "-e", "stderr", "-g", "daemon off;"]
    with subprocess.Popen(command) as process:
        wait_for((tmp_path / "nginx.pid").exists)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_clients_are_served_through_a_second_nginx(public: Gateway, balancer: str) -> None:
    def predict(scheme: str, key: str = KEYS["frank"], **headers: str) -> requests.Response:
        headers |= {"X-API-Key": key, "X-Test-Proto": scheme}
        url, data = f"{balancer}/classify/predict", CAT.read_bytes()
        return requests.post(url, data, headers=headers, timeout=60, allow_redirects=False)

    large = predict("https", **{"X-Test-Client": "192.0.2.77", "X-Test": "x" * 16_000})
    assert large.json()["success"] is True
    assert "strict-transport-security" in large.headers
    wait_for(lambda: '"address":"192.0.2.77"' in public.access_log.read_text())

    plain = predict("http")
    assert plain.status_code == 308
    assert plain.headers["location"].startswith("https://images.example.com")

    wrong = [predict("https", "wrong", **{"X-Test-Client": "192.0.2.78"}) for _ in range(40)]
    assert 429 in {each.status_code for each in wrong}
    other = predict("https", "wrong", **{"X-Test-Client": "192.0.2.79"})
    assert error(other) == (401, "Unauthorized")


@pytest.mark.parametrize("scheme", ["https", "HTTPS, http"])
def test_the_https_of_a_trusted_proxy_is_used(public: Gateway, scheme: str) -> None:
    served = public.predict(KEYS["dave"], **{"X-Forwarded-Proto": scheme})
    assert served.json()["success"] is True
    assert "strict-transport-security" in served.headers


def test_the_plain_http_of_a_trusted_proxy_is_redirected_to_its_host(public: Gateway) -> None:
    headers = {"X-Forwarded-Proto": "http", "Host": "images.example.com"}
    plain = public.predict(KEYS["dave"], **headers)
    assert plain.status_code == 308
    assert plain.headers["location"].startswith("https://images.example.com")


def test_forwarded_headers_of_an_untrusted_client_are_ignored(client: Gateway) -> None:
    forged = {"X-Forwarded-For": "192.0.2.9", "X-Request-Id": "forged-address", **HTTPS}
    answer = client.predict(**forged)
    assert answer.status_code == 200
    assert "strict-transport-security" not in answer.headers
    wait_for(lambda: "forged-address" in client.access_log.read_text())
    (line,) = (s for s in client.access_log.read_text().splitlines() if "forged-address" in s)
    assert '"address":"127.0.0.1"' in line
    assert "192.0.2.9" not in line


def test_a_path_prefix_is_served_and_the_web_ui_stays_below_it(public: Gateway) -> None:
    headers = {"Accept": "text/html", "X-API-Key": KEYS["erin"], **HTTPS}
    assert public.ask("GET", "/classify/", headers=headers).status_code == 200
    assert public.predict(KEYS["erin"], **HTTPS).json()["success"] is True
    outside = public.ask("POST", "/predict", data=b"x", headers=headers)
    assert error(outside) == (404, "NotFound")
    # Health checks need no prefix.
    assert public.ask("GET", "/healthz").status_code == 200
    assert public.ask("GET", "/classify").headers["location"] == "/classify/"


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


def test_headers_of_16_kilobytes_are_accepted(client: Gateway) -> None:
    """Identity-aware proxies of clouds send tokens of that size."""
    large = {"X-Test": "x" * 16_000, "Cookie": "c" * 16_000}
    assert client.predict(**large).status_code == 200
    command = ["curl", "--silent", "--http2", "--insecure", "--output", "/dev/null"]
    for name, value in large.items():
        command += ["--header", f"{name}: {value}"]
    url = f"{client.https_url}/healthz"
    shown = subprocess.check_output([*command, "--write-out", "%{http_code} %{http_version}", url])
    assert shown == b"200 2"


def test_expect_100_continue_is_answered_before_the_body(client: Gateway) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {CAT.stat().st_size}\r\n"
    with socket.create_connection(("127.0.0.1", client.options.http_port), 60) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(CAT.read_bytes())
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
