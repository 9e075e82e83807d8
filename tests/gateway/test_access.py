"""API keys, basic authentication, rate limits and TLS."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import HttpCredentials, expect, sync_playwright

from scripts.gateway import nginx
from scripts.gateway.keys import Key
from scripts.gateway.options import Options
from scripts.samples import CAT
from scripts.serve.running import ServerState
from scripts.terminal import UserError
from tests.browser.conftest import launch
from tests.gateway.cluster import Gateway, gateway, in_front_of, wait_for
from tests.gateway.conftest import KEYS, write_keys
from tests.gateway.test_gateway import error


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": f"{KEYS['bob']} "},
        {"X-API-Key": KEYS["bob"]},
        {"Authorization": f"Bearer {KEYS['bob']}"},
        {"Authorization": f"bEARER   {KEYS['bob']}"},
    ],
)
def test_a_key_is_accepted_in_each_header(keyed: Gateway, headers: dict[str, str]) -> None:
    assert keyed.predict(**headers).status_code == 200


@pytest.mark.parametrize("scheme", ["Basic", "basic  "])
def test_basic_authentication_takes_name_and_key(keyed: Gateway, scheme: str) -> None:
    browser = {"Accept": "text/html"}
    page = keyed.ask("GET", "/", auth=("alice", KEYS["alice"]), headers=browser)
    assert page.status_code == 200
    assert page.headers["x-signed-in"] == "alice"
    sent = str(page.request.headers["Authorization"]).split()[1]
    assert keyed.predict(Authorization=f"{scheme} {sent}").status_code == 200


def test_the_web_ui_classifies_after_signing_in(guarded: Gateway) -> None:
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        if browser is None:
            pytest.skip("NOT RUN: no Chromium (on Debian: apt install chromium)")
        credentials = HttpCredentials(username="alice", password=KEYS["alice"])
        page = browser.new_context(http_credentials=credentials).new_page()
        page.goto(f"{guarded.url}/")
        expect(page.locator("#account")).to_have_text("Signed in as alice")
        with page.expect_response(lambda answer: answer.request.method == "POST") as sent:
            page.set_input_files("input[type=file]", CAT)
        assert sent.value.json()["success"] is True
        wrong = HttpCredentials(username="alice", password="wrong")
        stranger = browser.new_context(http_credentials=wrong)
        answer = stranger.new_page().goto(f"{guarded.url}/")
        assert answer is not None
        assert answer.status == 401
        browser.close()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "wrong-key-0123456789"},
        {"X-API-Key": KEYS["alice"].upper()},
        {"X-API-Key": f"{KEYS['alice']}x"},
        {"Authorization": f"Basic {KEYS['alice']}"},
        # A valid name and key do not make up for an invalid X-API-Key.
        {"X-API-Key": "wrong", "Authorization": f"Basic {Key('alice', KEYS['alice']).basic}"},
    ],
)
def test_an_invalid_key_is_rejected(keyed: Gateway, headers: dict[str, str]) -> None:
    answer = keyed.predict(**headers)
    assert error(answer) == (401, "Unauthorized")
    assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert keyed.ask("GET", "/healthz").status_code == 200
    assert keyed.ask("GET", "/readyz").status_code == 200


@pytest.mark.parametrize("auth", [("bob", KEYS["alice"]), ("alice", "wrong"), ("", "")])
def test_basic_authentication_with_another_name_or_key_is_rejected(
    keyed: Gateway, auth: tuple[str, str]
) -> None:
    assert keyed.ask("GET", "/", auth=auth).status_code == 401


def test_a_client_over_its_limit_gets_429_and_another_is_served(guarded: Gateway) -> None:
    answers = [guarded.predict(KEYS["alice"]) for _ in range(12)]
    rejected = [answer for answer in answers if answer.status_code == 429]
    assert rejected
    assert error(rejected[0]) == (429, "TooManyRequests")
    assert rejected[0].headers["retry-after"] == "1"
    assert guarded.predict(KEYS["bob"]).status_code == 200


def test_few_of_many_rejected_requests_are_logged(guarded: Gateway) -> None:
    guarded.predict(KEYS["bob"])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: guarded.predict(KEYS["alice"]).status_code, range(400)))
    assert answers.count(429) > 300
    log = guarded.folder / "access.log"
    wait_for(lambda: log.read_text().count('"status":200') == answers.count(200) + 1)
    assert log.read_text().count('"status":429') < 20
    assert (guarded.folder / "error.log").read_text() == ""


def test_a_reload_rotates_a_long_log(guarded: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    log, older = guarded.folder / "access.log", guarded.folder / "access.log.1"
    for _ in range(2):
        guarded.predict(KEYS["bob"])
        wait_for(lambda: log.stat().st_size)
        nginx.reload(guarded.options, guarded.folder)
        assert log.stat().st_size
        assert not older.exists()
    monkeypatch.setattr(nginx, "_MAX_LOG_BYTES", 100)
    nginx.reload(guarded.options, guarded.folder)
    assert (older.read_text().count("/predict"), log.read_text()) == (2, "")
    guarded.predict(KEYS["bob"])
    wait_for(lambda: "/predict" in log.read_text())


def test_invalid_keys_are_limited_and_valid_ones_of_the_same_address_are_not(
    guarded: Gateway,
) -> None:
    statuses = Counter(guarded.predict("wrong-key-0123456789").status_code for _ in range(60))
    assert statuses.keys() == {401, 429}
    assert statuses[429] >= 30, statuses
    assert guarded.predict(KEYS["alice"]).status_code == 200


def test_a_reload_applies_changed_keys_unless_the_file_is_malformed(
    guarded: Gateway, keys: Path
) -> None:
    keys.write_text("alice alices key\n")
    with pytest.raises(UserError, match="line 1"):
        nginx.reload(guarded.options, guarded.folder)
    assert guarded.predict(KEYS["alice"]).status_code == 200
    write_keys(keys.parent, {"carol": "carols-key-0123456789"})
    nginx.reload(guarded.options, guarded.folder)
    assert guarded.predict("carols-key-0123456789").status_code == 200
    assert guarded.predict(KEYS["alice"]).status_code == 401
    assert (guarded.folder / "nginx.conf").stat().st_mode & 0o077 == 0


# --- TLS ---


def _by_https(client: Gateway, key: str = "") -> requests.Response:
    return requests.post(
        f"https://127.0.0.1:{client.options.https_port}/predict",
        data=CAT.read_bytes(),
        headers={"X-API-Key": key},
        verify=str(client.folder / "certificate.pem"),
        timeout=60,
    )


def test_https_has_the_certificate_hsts_and_http2(client: Gateway) -> None:
    answer = _by_https(client)
    assert answer.json()["success"] is True
    assert "max-age" in answer.headers["strict-transport-security"]
    assert "strict-transport-security" not in client.ask("GET", "/healthz").headers
    version = subprocess.check_output(
        [
            *("curl", "--silent", "--http2", "--cacert", client.folder / "certificate.pem"),
            *("--output", "/dev/null", "--write-out", "%{http_version}"),
            f"https://127.0.0.1:{client.options.https_port}/healthz",
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
        for cipher in ("AES_128_GCM_SHA256", "AES_256_GCM_SHA384", "CHACHA20_POLY1305_SHA256")
    ),
}


def test_tls_scan_finds_no_weakness(client: Gateway, tmp_path: Path) -> None:
    """Mozilla's intermediate profile, and the attacks that sslyze tries."""
    scans = _scan(client.options.https_port, tmp_path / "sslyze.json")
    for protocol in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1"):
        assert _accepted(scans, protocol) == set()
    new = _accepted(scans, "tls_1_2") | _accepted(scans, "tls_1_3")
    assert len(new) == 6  # with an ECDSA certificate
    assert new <= CIPHERS
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
        check=False,  # it also rejects the self-signed certificate
    )
    (result,) = json.loads(report.read_text())["server_scan_results"]
    return {name: scan["result"] for name, scan in result["scan_result"].items()}


def _accepted(scans: dict[str, Any], protocol: str) -> set[str]:
    accepted = scans[f"{protocol}_cipher_suites"]["accepted_cipher_suites"]
    return {suite["cipher_suite"]["name"] for suite in accepted}


def test_beyond_loopback_plain_http_is_redirected_to_https(
    running: ServerState, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens on loopback, which the patched options treat as a public address."""
    monkeypatch.setattr(Options, "is_loopback", False)
    acme = tmp_path / "acme" / ".well-known" / "acme-challenge"
    acme.mkdir(parents=True)
    (acme / "token").write_text("proof")
    for folder in (tmp_path, tmp_path / "acme"):
        folder.chmod(0o755)
    options = in_front_of(running, keys=str(keys), acme=str(tmp_path / "acme"))
    with gateway(options, tmp_path / "public" / "gateway") as public:
        plain = public.predict(KEYS["alice"])
        assert plain.status_code == 308
        location = f"https://127.0.0.1:{public.options.https_port}/predict"
        assert plain.headers["location"] == location
        assert _by_https(public, KEYS["alice"]).json()["success"] is True
        # certbot and health checks use plain HTTP.
        assert public.ask("GET", "/.well-known/acme-challenge/token").text == "proof"
        assert public.ask("GET", "/healthz").status_code == 200
