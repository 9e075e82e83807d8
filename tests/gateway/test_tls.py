"""TLS, HTTP/2, and what faces others than this machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.gateway import config
from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, require_gateway
from scripts.samples import CAT
from tests.gateway.cluster import free_options
from tests.gateway.conftest import KEYS, Client


def _predict_by_https(client: Client, key: str = "") -> requests.Response:
    return requests.post(
        f"{client.gateway.https_url}/predict",
        data=CAT.read_bytes(),
        headers={"X-API-Key": key},
        verify=client.gateway.options.certificate,
        timeout=60,
    )


def test_https_serves_with_the_certificate_and_http2(client: Client) -> None:
    answer = _predict_by_https(client)
    assert answer.json()["success"] is True
    assert "max-age" in answer.headers["strict-transport-security"]
    version = subprocess.check_output(
        [
            *("curl", "--silent", "--http2", "--cacert", client.gateway.options.certificate),
            *("--output", "/dev/null", "--write-out", "%{http_version}"),
            f"{client.gateway.https_url}/healthz",
        ],
    )
    assert version == b"2"


# Forward secrecy and authenticated encryption: Mozilla's intermediate profile.
CIPHERS = {
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    *(
        f"TLS_ECDHE_{kind}_WITH_{cipher}"
        for kind in ("ECDSA", "RSA")
        for cipher in (
            "AES_128_GCM_SHA256",
            "AES_256_GCM_SHA384",
            "CHACHA20_POLY1305_SHA256",
        )
    ),
}
# secp256r1 is what OpenSSL calls prime256v1.
CURVES = {"X25519", "secp256r1", "secp384r1"}


def test_a_tls_scan_has_no_finding(client: Client, tmp_path: Path) -> None:
    """Mozilla's intermediate profile, and every known attack that sslyze tries."""
    scans = _scan(client.gateway.options.https_port, tmp_path / "sslyze.json")
    assert _weaknesses(scans) == []
    assert len(_accepted(scans, "tls_1_2")) == 3  # those of an ECDSA certificate
    assert len(_accepted(scans, "tls_1_3")) == 3
    assert scans["heartbleed"]["is_vulnerable_to_heartbleed"] is False
    assert scans["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"] is False
    assert scans["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    assert scans["tls_compression"]["supports_compression"] is False
    renegotiation = scans["session_renegotiation"]
    assert renegotiation["is_vulnerable_to_client_renegotiation_dos"] is False
    assert renegotiation["supports_secure_renegotiation"] is True


def _scan(port: int, report: Path) -> dict[str, Any]:
    subprocess.run(
        [sys.executable, "-m", "sslyze", "--json_out", report, f"127.0.0.1:{port}"],
        capture_output=True,
        check=False,  # its own verdict is about the certificate too, which is self-signed
    )
    (result,) = json.loads(report.read_text())["server_scan_results"]
    return {name: scan["result"] for name, scan in result["scan_result"].items()}


def _accepted(scans: dict[str, Any], protocol: str) -> set[str]:
    accepted = scans[f"{protocol}_cipher_suites"]["accepted_cipher_suites"]
    return {suite["cipher_suite"]["name"] for suite in accepted}


def _weaknesses(scans: dict[str, Any]) -> list[str]:
    """What is accepted and should not be."""
    old = [
        f"{protocol}: {suite}"
        for protocol in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1")
        for suite in _accepted(scans, protocol)
    ]
    new = {suite for protocol in ("tls_1_2", "tls_1_3") for suite in _accepted(scans, protocol)}
    curves = {curve["name"] for curve in scans["elliptic_curves"]["supported_curves"]}
    return [*old, *sorted(new - CIPHERS), *sorted(curves - CURVES)]


def test_beyond_this_machine_keys_do_not_travel_in_the_clear(
    cluster: Gateway, folder: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On loopback, as all tests; only the gateway takes it for an address of the network."""
    monkeypatch.setattr(config, "is_loopback", lambda _: False)
    assert cluster.process() is not None
    nodes, place = require_gateway(folder).nodes, tmp_path / "public"
    public = starting.start(free_options(keys=str(keys)), nodes, place, watch=False)
    try:
        plain = Client(public).predict(KEYS["alice"])
        assert plain.status_code == 308
        assert plain.headers["location"] == f"{public.https_url}/predict"
        assert _predict_by_https(Client(public), KEYS["alice"]).json()["success"] is True
    finally:
        starting.stop(public, place)
