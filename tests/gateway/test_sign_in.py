"""A person with a key and a browser: sign in, classify, sign out."""

from collections import Counter
from http import HTTPStatus
from pathlib import Path

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from scripts.gateway.keys import SESSION_SECONDS, Key
from scripts.gateway.nginx import change_nodes
from scripts.samples import CAT
from tests.browser.conftest import launch
from tests.gateway.conftest import KEYS, Client
from tests.gateway.faults import wait_for

FOREIGN = "https://evil.example"


def _sign_in(client: Client, key: str, **headers: str) -> requests.Response:
    return client.ask("POST", "/sign-in", data={"key": key}, headers=headers)


def _session(answer: requests.Response) -> str:
    assert answer.status_code == HTTPStatus.SEE_OTHER, answer.text
    return answer.headers["set-cookie"].split(";")[0]


def test_a_browser_without_a_key_is_led_to_the_sign_in_and_a_program_gets_401(
    guarded: Client,
) -> None:
    html = {"Accept": "text/html"}
    led = guarded.ask("GET", "/", headers=html)
    assert (led.status_code, led.headers["location"]) == (303, "/sign-in")
    assert guarded.ask("GET", "/").status_code == 401
    assert guarded.ask("POST", "/", headers=html, data=b"x").status_code == 401
    page = guarded.ask("GET", "/sign-in")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text


def test_a_key_becomes_a_cookie_that_counts_like_the_key_until_the_key_is_gone(
    guarded: Client,
) -> None:
    answer = _sign_in(guarded, f" {KEYS['alice']} \n", Origin=guarded.gateway.url)
    cookie = answer.headers["set-cookie"]
    for attribute in ("HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={SESSION_SECONDS}"):
        assert attribute in cookie
    session = _session(answer)
    assert guarded.predict(Cookie=session).headers["x-signed-in"] == "alice"
    assert "x-signed-in" not in guarded.predict(KEYS["alice"]).headers
    # One limit for both: 4 at once beyond 1 a second.
    by_session = {"headers": {"Cookie": session}}
    statuses = Counter(guarded.ask("GET", "/", **by_session).status_code for _ in range(12))
    assert statuses[429] >= 2
    assert guarded.predict(KEYS["alice"]).status_code == 429
    log = guarded.folder / "access.log"
    wait_for(lambda: log.read_text().count('"client":"alice"') >= 11)
    for text in (cookie, log.read_text(), (guarded.folder / "error.log").read_text()):
        assert KEYS["alice"] not in text
    assert session.partition("=")[2] not in log.read_text()

    others = _session(_sign_in(guarded, KEYS["bob"]))
    Path(guarded.gateway.options.keys).write_text(f"bob {KEYS['bob']}\n")
    change_nodes(tuple, guarded.folder)
    # nginx's old processes may take a request more.
    wait_for(lambda: guarded.predict(Cookie=session).status_code == 401)
    assert guarded.predict(Cookie=others).status_code == 200


def test_what_is_no_session_and_what_a_foreign_page_sends_is_rejected(guarded: Client) -> None:
    session = _session(_sign_in(guarded, KEYS["alice"]))
    name, code = session.split("=")
    for cookie in ("session=", f"{name}={'0' * 64}", f"{name}={code[:-1]}", f"x{name}={code}"):
        assert guarded.predict(Cookie=cookie).status_code == 401, cookie
    assert guarded.predict(Cookie=session, Origin=FOREIGN).status_code == 401
    # A wrong key is not mended by a session beside it.
    assert guarded.predict("wrong-key-0123456789", Cookie=session).status_code == 401
    signed_in = _sign_in(guarded, KEYS["bob"], Origin=FOREIGN)
    out = guarded.ask("GET", "/sign-out", headers={"Sec-Fetch-Site": "cross-site"})
    for answer in (signed_in, out):
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


def test_a_wrong_key_is_rejected_and_not_often(guarded: Client) -> None:
    for form in ("", "key=", "key=a\r\nX-API-Key: b", f"x&key={KEYS['alice']}", "key=" + 999 * "x"):
        answer = guarded.ask("POST", "/sign-in", data=form.encode())
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False), form
    statuses = Counter(_sign_in(guarded, "wrong-key-0123456789").status_code for _ in range(40))
    assert statuses[429] >= 15, statuses
    # The limit comes before the key is looked at, and is one with that of wrong keys elsewhere.
    assert _sign_in(guarded, KEYS["alice"]).status_code == 429
    assert guarded.predict("wrong-key-0123456789").status_code == 429


def test_a_session_counts_for_a_day_at_most() -> None:
    key = Key("alice", KEYS["alice"])
    handed_out = key.sessions("secret", now=0.0)[0]
    assert handed_out in key.sessions("secret", now=1.9 * SESSION_SECONDS)
    assert handed_out not in key.sessions("secret", now=2.0 * SESSION_SECONDS)
    assert not set(key.sessions("secret", now=0.0)) & set(key.sessions("other", now=0.0))


@pytest.mark.parametrize("secure", [True, False])
def test_in_a_browser(guarded: Client, *, secure: bool) -> None:
    url = guarded.gateway.https_url if secure else guarded.gateway.url
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        if browser is None:
            pytest.skip("no Chromium")
        # The certificate is self-signed.
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.goto(url)
        assert page.url == f"{url}/sign-in"
        report = Axe().run(page)
        assert report.violations_count == 0, report.generate_report()
        page.get_by_label("Your key").fill("wrong-key-0123456789")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("not known")
        page.get_by_label("Your key").fill(KEYS["alice"])
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"{url}/")

        (cookie,) = page.context.cookies()
        assert cookie["name"] == ("__Host-session" if secure else "session")
        assert (cookie["httpOnly"], cookie["secure"]) == (True, secure)
        with page.expect_response(lambda answer: answer.request.method == "POST") as sent:
            page.set_input_files("input[type=file]", CAT)
        assert sent.value.json()["success"] is True

        page.goto(f"{url}/sign-out")
        assert page.url == f"{url}/sign-in"
        assert page.context.cookies() == []
        browser.close()
