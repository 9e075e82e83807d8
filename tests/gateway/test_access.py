"""API keys, basic authentication, rate limits and TLS."""

import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from playwright.sync_api import HttpCredentials, expect, sync_playwright

from scripts.gateway.keys import Key
from scripts.samples import CAT
from tests.browser.conftest import launch
from tests.gateway.cluster import TIMEOUT, Gateway, error, wait_for
from tests.gateway.conftest import KEYS

# A load balancer that terminates TLS sends this.
HTTPS = {"X-Forwarded-Proto": "https"}
WRONG = "wrong-key-0123456789"


def _basic(name: str, key: str, scheme: str = "Basic") -> dict[str, str]:
    return {"Authorization": f"{scheme} {Key(name, key).basic}"}


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": f"{KEYS['bob']} "},
        {"X-API-Key": KEYS["bob"]},
        {"Authorization": f"Bearer {KEYS['bob']}"},
        {"Authorization": f"bEARER   {KEYS['bob']}"},
        _basic("alice", KEYS["alice"], "basic "),
    ],
)
def test_a_key_is_accepted_in_each_header(keyed: Gateway, headers: dict[str, str]) -> None:
    assert keyed.predict(**headers).status_code == 200


def test_basic_authentication_names_the_user_for_the_web_ui(keyed: Gateway) -> None:
    auth = ("alice", KEYS["alice"])
    page = keyed.ask("GET", "/", auth=auth, headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["x-signed-in"]) == (200, "alice")


def test_the_web_ui_classifies_after_signing_in(keyed: Gateway) -> None:
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        if browser is None:
            pytest.skip("NOT RUN: no Chromium (on Debian: apt install chromium)")
        credentials = HttpCredentials(username="alice", password=KEYS["alice"])
        page = browser.new_context(http_credentials=credentials).new_page()
        page.goto(f"{keyed.url}/")
        expect(page.locator("#account")).to_have_text("Signed in as alice")
        with page.expect_response(lambda answer: answer.request.method == "POST") as sent:
            page.set_input_files("input[type=file]", CAT)
        assert sent.value.json()["success"] is True
        wrong = HttpCredentials(username="alice", password="wrong")
        answer = browser.new_context(http_credentials=wrong).new_page().goto(f"{keyed.url}/")
        assert answer is not None
        assert answer.status == 401
        browser.close()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": WRONG},
        {"X-API-Key": KEYS["alice"].upper()},
        {"X-API-Key": f"{KEYS['alice']}x"},
        {"Authorization": f"Basic {KEYS['alice']}"},
        # A valid name and key do not make up for an invalid X-API-Key.
        {"X-API-Key": "wrong", **_basic("alice", KEYS["alice"])},
        _basic("bob", KEYS["alice"]),
        _basic("alice", "wrong"),
        _basic("", ""),
    ],
)
def test_an_invalid_key_is_rejected(keyed: Gateway, headers: dict[str, str]) -> None:
    answer = keyed.predict(**headers)
    assert error(answer) == (401, "Unauthorized")
    assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert keyed.ask("GET", "/healthz").status_code == 200
    assert keyed.ask("GET", "/readyz").status_code == 200


def test_a_client_over_its_limit_gets_429_and_another_is_served(public: Gateway) -> None:
    answers = [public.predict(KEYS["alice"], **HTTPS) for _ in range(12)]
    rejected = [answer for answer in answers if answer.status_code == 429]
    assert rejected
    assert error(rejected[0]) == (429, "TooManyRequests")
    assert rejected[0].headers["retry-after"] == "1"
    assert public.predict(KEYS["bob"], **HTTPS).status_code == 200


def test_few_of_many_rejected_requests_are_logged(public: Gateway) -> None:
    with ThreadPoolExecutor(8) as pool:
        flood = pool.map(lambda _: public.predict(KEYS["carol"], **HTTPS).status_code, range(400))
        answers = Counter(flood)
    assert answers[429] > 300

    def logged(status: int) -> int:
        lines = map(json.loads, public.access_log.read_text().splitlines())
        return sum((line["client"], line["status"]) == ("carol", status) for line in lines)

    wait_for(lambda: logged(200) == answers[200])
    assert logged(429) < 20
    assert (public.folder / "error.log").read_text() == ""


def test_invalid_keys_are_limited_per_address_and_valid_ones_are_not(public: Gateway) -> None:
    first = {**HTTPS, "X-Forwarded-For": "192.0.2.1"}
    statuses = Counter(public.predict(WRONG, **first).status_code for _ in range(60))
    assert statuses.keys() == {401, 429}
    assert statuses[429] >= 30, statuses
    assert public.predict(KEYS["bob"], **first).status_code == 200
    second = {**HTTPS, "X-Forwarded-For": "192.0.2.2"}
    assert public.predict(WRONG, **second).status_code == 401
    wait_for(lambda: '"address":"192.0.2.2"' in public.access_log.read_text())


# --- TLS ---


def _by_https(started: Gateway, **headers: str) -> requests.Response:
    return requests.post(
        f"{started.https_url}{started.options.prefix}/predict",
        data=CAT.read_bytes(),
        headers=headers,
        verify=str(started.folder / "certificate.pem"),
        timeout=TIMEOUT,
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
            f"{client.https_url}/healthz",
        ],
    )
    assert version == b"2"


def test_beyond_loopback_plain_http_is_redirected_to_https(public: Gateway) -> None:
    plain = public.predict(KEYS["erin"])
    assert plain.status_code == 308
    assert plain.headers["location"] == f"{public.https_url}/classify/predict"
    assert _by_https(public, **{"X-API-Key": KEYS["erin"]}).json()["success"] is True
    # certbot and health checks use plain HTTP.
    challenge = Path(public.options.acme, ".well-known", "acme-challenge")
    challenge.mkdir(parents=True)
    (challenge / "token").write_text("proof")
    assert public.ask("GET", "/.well-known/acme-challenge/token").text == "proof"
    assert public.ask("GET", "/healthz").status_code == 200


def test_tls_conforms_to_mozillas_intermediate_profile(client: Gateway) -> None:
    """Except for the trial certificate and two more elliptic curves, which are strong."""
    command = [sys.executable, "-m", "sslyze", f"127.0.0.1:{client.options.https_port}"]
    report = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    scans, _, compliance = report.partition("COMPLIANCE AGAINST TLS CONFIGURATION")
    assert "VULNERABLE - " not in scans
    assert scans.count("The server accepted the following 3 cipher suites") == 2
    assert 'Mozilla\'s "intermediate" configuration' in compliance
    deviations = set(re.findall(r"^ +\* (\w+):", compliance, re.MULTILINE))
    assert deviations <= {"certificate_path_validation", "tls_curves"}
