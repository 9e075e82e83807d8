"""TLS, HTTP/2, and what faces others than this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from scripts import gateway as gateways
from scripts.gateway import Gateway, Options, find_gateway
from scripts.keys import read_keys
from scripts.photographs import CAT
from scripts.terminal import UserError
from tests.gateway.client import Client
from tests.gateway.conftest import KEYS, free_options


def test_https_serves_with_the_certificate_and_http2(client: Client) -> None:
    options = client.gateway.options
    answer = requests.post(
        f"{client.gateway.https_url}/predict",
        data=CAT.read_bytes(),
        verify=options.certificate,
        timeout=60,
    )
    assert answer.json()["success"] is True
    assert "max-age" in answer.headers["strict-transport-security"]
    version = subprocess.run(
        [
            *("curl", "--silent", "--http2", "--cacert", options.certificate),
            *("--output", "/dev/null", "--write-out", "%{http_version}"),
            f"{client.gateway.https_url}/healthz",
        ],
        capture_output=True,
        check=True,
    ).stdout
    assert version == b"2"


def test_a_tls_scan_has_no_finding(client: Client, tmp_path: Path) -> None:
    """Mozilla's intermediate profile, and every known attack that sslyze tries."""
    report = tmp_path / "sslyze.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sslyze", "--mozilla_config=intermediate"),
            *("--json_out", report, f"127.0.0.1:{client.gateway.options.https_port}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    (result,) = json.loads(report.read_text())["server_scan_results"]
    scans = {name: scan["result"] for name, scan in result["scan_result"].items()}
    for old in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1"):
        assert scans[f"{old}_cipher_suites"]["accepted_cipher_suites"] == []
    assert scans["heartbleed"]["is_vulnerable_to_heartbleed"] is False
    assert scans["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"] is False
    assert scans["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    assert scans["tls_compression"]["supports_compression"] is False
    renegotiation = scans["session_renegotiation"]
    assert renegotiation["is_vulnerable_to_client_renegotiation_dos"] is False
    assert renegotiation["supports_secure_renegotiation"] is True
    complaints = [line for line in done.stdout.splitlines() if "not compliant" in line.lower()]
    assert done.returncode == 0 or complaints, done.stdout[-2000:]
    assert not complaints or "certificate" in done.stdout.lower(), done.stdout[-2000:]


def test_beyond_this_machine_keys_are_compulsory(cluster: Gateway, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody would need a key"):
        gateways.start(Options(host="0.0.0.0"), cluster.nodes, tmp_path / "open", watch=False)


def test_beyond_this_machine_keys_do_not_travel_in_the_clear(
    cluster: Gateway, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On loopback, as all tests; only the gateway takes it for an address of the network."""
    monkeypatch.setattr(gateways, "_is_loopback", lambda _: False)
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"alice {KEYS['alice']}\n")
    current = find_gateway(folder)
    assert current is not None
    assert current.pid == cluster.pid
    options = free_options(keys=str(keys))
    place = tmp_path / "public"
    public = gateways.start(options, current.nodes, place, watch=False)
    try:
        plain = requests.post(f"{public.url}/predict", timeout=10, allow_redirects=False)
        assert plain.status_code == 308
        assert plain.headers["location"] == f"{public.https_url}/predict"
        answer = requests.post(
            f"{public.https_url}/predict",
            data=CAT.read_bytes(),
            headers={"X-API-Key": KEYS["alice"]},
            verify=public.options.certificate,
            timeout=60,
        )
        assert answer.json()["success"] is True
    finally:
        gateways.stop(public, place)


def test_a_file_of_keys_is_checked(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice short\n")
    with pytest.raises(UserError, match="chmod 600"):
        read_keys(keys)
    keys.chmod(0o600)
    with pytest.raises(UserError, match="line 1"):
        read_keys(keys)
    keys.write_text('alice 0123456789abcdef";return\n')
    with pytest.raises(UserError, match="line 1"):
        read_keys(keys)
