"""A person with a key and a browser: sign in, classify, sign out."""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.faults import wait_for
from scripts.gateway.keys import SESSION_SECONDS, Key
from scripts.gateway.nginx import change_nodes
from scripts.samples import CAT
from tests.browser.conftest import _chromium
from tests.gateway.client import Client
from tests.gateway.conftest import KEYS

HTML = {"Accept": "text/html"}
_CODE = re.compile(r"[0-9a-f]{64}")


def _sign_in(client: Client, key: str, **headers: str) -> requests.Response:
    return client.ask("POST", "/sign-in", data={"key": key}, headers=headers, allow_redirects=False)


def _session(answer: requests.Response) -> dict[str, str]:
    assert answer.status_code == HTTPStatus.SEE_OTHER, answer.text
    return {"Cookie": answer.headers["set-cookie"].split(";")[0]}


def _predict(client: Client, headers: dict[str, str]) -> requests.Response:
    return client.ask("POST", "/predict", data=CAT.read_bytes(), headers=headers)


def test_a_browser_without_a_key_is_led_to_the_sign_in_and_a_program_is_told(
    guarded: Client,
) -> None:
    led = guarded.ask("GET", "/", headers=HTML, allow_redirects=False)
    assert (led.status_code, led.headers["location"]) == (303, "/sign-in")
    assert guarded.ask("GET", "/").status_code == 401
    assert guarded.ask("POST", "/", headers=HTML, data=b"x").status_code == 401
    page = guarded.ask("GET", "/sign-in")
    assert "<form" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text


def test_a_right_key_becomes_a_cookie_that_counts_like_the_key(guarded: Client) -> None:
    answer = _sign_in(guarded, f" {KEYS['alice']} \n", Origin=guarded.gateway.url)
    cookie = answer.headers["set-cookie"]
    for attribute in ("HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={SESSION_SECONDS}"):
        assert attribute in cookie
    assert KEYS["alice"] not in cookie
    session = _session(answer)
    classified = _predict(guarded, session)
    assert classified.status_code == 200
    assert classified.headers["x-signed-in"] == "alice"
    by_key = _predict(guarded, {"X-API-Key": KEYS["alice"]})
    assert "x-signed-in" not in by_key.headers
    # The same name in the log, and the same limit: 4 at once beyond 1 a second.
    statuses = Counter(_predict(guarded, session).status_code for _ in range(8))
    assert statuses[429] >= 2
    assert _predict(guarded, {"X-API-Key": KEYS["alice"]}).status_code == 429
    assert _predict(guarded, {"X-API-Key": KEYS["bob"]}).status_code == 200
    time.sleep(1.5)
    folder = Path(guarded.gateway.options.certificate).parent
    log = (folder / "access.log").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert {line["client"] for line in lines if line["path"] == "/predict"} == {"alice", "bob"}
    for text in (log, (folder / "error.log").read_text()):
        assert not _CODE.search(text)
        assert KEYS["alice"] not in text


def test_what_is_no_session_gets_nobody_in(guarded: Client) -> None:
    answer = _sign_in(guarded, KEYS["alice"])
    session = _session(answer)["Cookie"]
    name, code = session.split("=")
    for cookie in ("session=", f"{name}={'0' * 64}", f"{name}={code[:-1]}", f"x{name}={code}"):
        assert _predict(guarded, {"Cookie": cookie}).status_code == 401, cookie
    # Of another page's request a browser says where it comes from.
    foreign = {"Cookie": session, "Origin": "https://evil.example"}
    assert _predict(guarded, foreign).status_code == 401
    # A wrong key is not mended by a session beside it.
    beside = {"Cookie": session, "X-API-Key": "wrong-key-0123456789"}
    assert _predict(guarded, beside).status_code == 401


def test_a_foreign_page_can_neither_sign_in_nor_out(guarded: Client) -> None:
    signed_in = _sign_in(guarded, KEYS["bob"], Origin="https://evil.example")
    assert (signed_in.status_code, "set-cookie" in signed_in.headers) == (403, False)
    out = guarded.ask(
        "GET", "/sign-out", headers={"Sec-Fetch-Site": "cross-site"}, allow_redirects=False
    )
    assert (out.status_code, "set-cookie" in out.headers) == (403, False)


def test_a_wrong_key_is_refused_in_words_and_seldom(guarded: Client) -> None:
    refused = _sign_in(guarded, "wrong-key-0123456789")
    assert refused.status_code == 403
    assert "not known" in refused.text
    assert "set-cookie" not in refused.headers
    for form in ("", "key=", "key=a\r\nX-API-Key: b", f"x&key={KEYS['alice']}", "key=" + 999 * "x"):
        answer = guarded.ask("POST", "/sign-in", data=form.encode(), allow_redirects=False)
        assert answer.status_code == 403, form
    statuses = Counter(_sign_in(guarded, "wrong-key-0123456789").status_code for _ in range(40))
    assert statuses[429] >= 15, statuses
    # The limit comes before the key is looked at, and is one with that of wrong keys elsewhere.
    assert _sign_in(guarded, KEYS["alice"]).status_code == 429
    assert guarded.predict("wrong-key-0123456789").status_code == 429
    assert guarded.predict(KEYS["alice"]).status_code == 200


def test_wrong_keys_are_limited_and_right_ones_beside_them_are_not(guarded: Client) -> None:
    answers = [guarded.predict("wrong-key-0123456789") for _ in range(60)]
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {401, 429}
    assert statuses[429] >= 30, statuses
    assert guarded.predict(KEYS["alice"]).status_code == 200


def test_a_session_ends_with_its_key(guarded: Client) -> None:
    session = _session(_sign_in(guarded, KEYS["alice"]))
    others = _session(_sign_in(guarded, KEYS["bob"]))
    assert _predict(guarded, session).status_code == 200
    options = guarded.gateway.options
    Path(options.keys).write_text(f"bob {KEYS['bob']}\n")
    change_nodes(tuple, Path(options.certificate).parent)
    # nginx's old processes may take a request more.
    wait_for(lambda: _predict(guarded, session).status_code == 401)
    assert _predict(guarded, others).status_code == 200


def test_a_session_counts_for_a_day_at_most() -> None:
    key = Key("alice", KEYS["alice"])
    handed_out = key.sessions("secret", now=0.0)[0]
    assert handed_out in key.sessions("secret", now=1.9 * SESSION_SECONDS)
    assert handed_out not in key.sessions("secret", now=2.0 * SESSION_SECONDS)
    assert not set(key.sessions("secret", now=0.0)) & set(key.sessions("other", now=0.0))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = _chromium(playwright.chromium)
        if path is None:
            pytest.skip("no Chromium")
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=path, args=["--disable-gpu", *root])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A browser that takes the certificate for trying for a good one."""
    context = browser.new_context(ignore_https_errors=True)
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("secure", [True, False])
def test_in_a_browser(guarded: Client, page: Page, tmp_path: Path, *, secure: bool) -> None:
    url = guarded.gateway.https_url if secure else guarded.gateway.url
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
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, secure, "Strict")
    assert page.evaluate("document.cookie") == ""

    picture = tmp_path / "cat.png"
    shutil.copyfile(CAT, picture)
    with page.expect_response(lambda answer: answer.request.method == "POST") as sent:
        page.set_input_files("input[type=file]", picture)
    assert sent.value.status == 200
    assert sent.value.headers["x-signed-in"] == "alice"
    assert sent.value.json()["success"] is True

    page.goto(f"{url}/sign-out")
    assert page.url == f"{url}/sign-in"
    assert page.context.cookies() == []
    page.goto(url)
    assert page.url == f"{url}/sign-in"
