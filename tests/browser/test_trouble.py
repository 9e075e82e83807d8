"""A server that is away, busy, or wants to know who asks; behind a gateway's own paths."""

import json
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import requests
from playwright.sync_api import Page, expect

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.management import model_status
from scripts.serve.running import HOST, Running, free_ports
from scripts.serve.server import start, stop
from tests.browser.conftest import Console
from tests.browser.person import (
    CAT_BYTES,
    TIMEOUT,
    answered,
    choose,
    copy_of,
    expect_the_cats_answer,
    payload,
)

Open = Callable[..., Page]


class Gateway(ThreadingHTTPServer):
    """Has the page at `/` of a path of its own, and can be told to be in trouble.

    Attributes:
        refusal: the status of every answer to a picture; 0 for a broken connection, None for none.
        retry_after: beside it.
        poison: breaks the connection for bodies that hold this, and for no others.
        signed_in: who is, as the header says; somebody is once `/sign-in` was opened.
        times: when pictures came, in seconds.
    """

    refusal: int | None = None
    retry_after: int | None = None
    poison: bytes | None = None
    signed_in: str | None = None

    def __init__(self, predictions_url: str) -> None:
        super().__init__((HOST, 0), Answer)
        self.predictions_url = predictions_url
        self.url = f"http://{HOST}:{self.server_port}"
        self.times: list[float] = []


class Answer(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        if self.path == "/sign-in":
            self.server.signed_in, self.server.refusal = "ada", None
            self.answer(200, {"Content-Type": "text/html"}, b"<title>Sign in</title>")
            return
        self.relay(
            requests.get(self.server.predictions_url, headers=self.accept(), timeout=TIMEOUT)
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.times.append(time.monotonic())
        if server.refusal == 0 or (server.poison is not None and server.poison in body):
            self.close_connection = True
            return
        if server.refusal is not None:
            wait = server.retry_after
            self.answer(server.refusal, {} if wait is None else {"Retry-After": str(wait)}, b"")
            return
        name = self.path.rsplit("/", 1)[1]
        url = {
            "predict": server.predictions_url,
            "explain": server.predictions_url.replace("/predictions/", "/explanations/"),
        }[name]
        headers = {**self.accept(), "Content-Type": self.headers["Content-Type"]}
        self.relay(requests.post(url, data=body, headers=headers, timeout=TIMEOUT))

    def accept(self) -> dict[str, str]:
        return {"Accept": self.headers["Accept"]}

    def relay(self, answer: requests.Response) -> None:
        names = ("Content-Type", "Content-Security-Policy")
        headers = {name: answer.headers[name] for name in names if name in answer.headers}
        self.answer(answer.status_code, headers, answer.content)

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        if self.server.signed_in:
            headers = {**headers, "X-Signed-In": self.server.signed_in}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output clean."""


@pytest.fixture
def gateway(running: Running) -> Iterator[Gateway]:
    with Gateway(running.predictions_url) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/", "/see/what/?a=b#c"])
def test_the_page_works_at_a_gateways_own_paths(
    open_page: Open, running: Running, gateway: Gateway, path: str
) -> None:
    page = open_page(gateway.url + path)
    choose(page, CAT)
    expect_the_cats_answer(page, running)
    page.locator(".guess").first.click()
    expect(page.locator(".seen")).to_be_visible()
    page.locator(".copy").click()
    folder = path.partition("?")[0]
    expect(page.locator(".curl pre")).to_contain_text(f"{gateway.url}{folder}predict")


# --- What is wrong with one picture ---


@pytest.mark.parametrize(
    "refusal",
    [
        (403, "You may not ask this server", False),
        (404, "answered with status 404", False),
        (413, "larger than the server accepts", False),
        (500, "failed on this picture", True),
    ],
)
def test_a_refusal_of_another_servers_is_put_in_plain_words(
    open_page: Open, gateway: Gateway, console: Console, refusal: tuple[int, str, bool]
) -> None:
    status, words, again = refusal
    gateway.refusal = status
    page = open_page(gateway.url)
    choose(page, CAT)
    expect(page.locator(".message")).to_contain_text(words)
    expect(page.locator("#trouble")).not_to_be_visible()
    expect(page.locator(".again")).to_be_visible(visible=again)
    if again:
        gateway.refusal = None
        page.get_by_role("button", name="Try again").click()
        expect(answered(page)).to_have_count(1)
        expect(page.locator(".message")).not_to_be_visible()
    console.expect(f"status of {status}")


def test_a_picture_that_the_server_never_answers_does_not_hold_up_the_others(
    open_page: Open, gateway: Gateway, console: Console
) -> None:
    gateway.poison = b"never to be answered"
    page = open_page(gateway.url)
    choose(page, payload("poison.png", CAT_BYTES + gateway.poison), *map(copy_of, PHOTOGRAPHS[:3]))
    expect(answered(page)).to_have_count(3)
    expect(page.locator(".failed .message")).to_have_text(
        "The server answers others, but not this picture.", timeout=15_000
    )
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("net::ERR_")


# --- What is wrong with the server ---


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "The server cannot be reached."),
        (429, "The server has too much to do."),
        (502, "The server is busy or just starting."),
        (503, "The server is busy or just starting."),
        (504, "The server is busy or just starting."),
    ],
)
def test_an_outage_is_one_notice_and_the_pictures_are_sent_when_it_is_over(
    open_page: Open, gateway: Gateway, console: Console, status: int, words: str
) -> None:
    gateway.refusal = status
    page = open_page(gateway.url)
    choose(page, *PHOTOGRAPHS[:13])
    expect(page.locator("#trouble-what")).to_have_text(words)
    expect(page.locator("#trouble-when")).to_contain_text("Your 13 pictures wait here; next try in")
    page.wait_for_timeout(2_000)
    expect(page.locator(".failed")).to_have_count(0)
    expect(page.locator("text=" + words)).to_have_count(2)  # and in the announcer
    gateway.refusal = None
    expect(answered(page)).to_have_count(13, timeout=20_000)
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("net::ERR_" if status == 0 else f"status of {status}")


def test_a_server_in_trouble_is_asked_by_one_picture_and_less_and_less(
    open_page: Open, gateway: Gateway, console: Console
) -> None:
    gateway.refusal = 503
    page = open_page(gateway.url)
    choose(page, *PHOTOGRAPHS[:13])
    while len(gateway.times) < 7:
        page.wait_for_timeout(100)
    # Four were on their way; the others came one at a time, after 1, 2 and 4 seconds.
    began = gateway.times[0]
    for came, least in zip(gateway.times[4:7], (1, 3, 7), strict=True):
        assert came - began >= least
    console.expect("status of 503")


def test_nobody_has_to_wait_for_the_next_try_and_the_servers_own_pause_is_kept(
    open_page: Open, gateway: Gateway, console: Console
) -> None:
    gateway.refusal, gateway.retry_after = 503, 200
    page = open_page(gateway.url)
    choose(page, CAT)
    expect(page.locator("#trouble-when")).to_have_text(
        re.compile(r"Your picture waits here; next try in (200|19\d)\u00a0s\.")
    )
    gateway.refusal = None
    page.wait_for_timeout(1_500)
    assert len(gateway.times) == 1
    page.get_by_role("button", name="Try now").click()
    expect(answered(page)).to_have_count(1)
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("status of 503")


def test_the_notice_goes_with_the_last_picture_that_waited(
    open_page: Open, gateway: Gateway, console: Console
) -> None:
    gateway.refusal = 503
    page = open_page(gateway.url)
    choose(page, CAT)
    expect(page.locator("#trouble")).to_be_visible()
    page.get_by_role("button", name="Remove chelsea.png").click()
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("status of 503")


def test_a_file_that_is_gone_when_the_server_is_back_is_told_as_such(
    open_page: Open, gateway: Gateway, console: Console, tmp_path: Path
) -> None:
    photo = tmp_path / "cat.png"
    photo.write_bytes(CAT_BYTES)
    gateway.refusal, gateway.retry_after = 503, 200
    page = open_page(gateway.url)
    choose(page, photo)
    expect(page.locator("#trouble")).to_be_visible()
    photo.unlink()
    gateway.refusal = None
    page.get_by_role("button", name="Try now").click()
    expect(page.locator(".message")).to_contain_text("moved, changed or deleted")
    expect(page.locator("#trouble")).not_to_be_visible()
    assert len(gateway.times) == 1
    console.expect("status of 503")
    console.expect("net::ERR_FILE_NOT_FOUND", optional=True)


# --- Who asks ---


def test_somebody_who_must_sign_in_is_led_there_and_keeps_the_pictures(
    open_page: Open, gateway: Gateway, console: Console
) -> None:
    page = open_page(gateway.url)
    expect(page.locator("#account")).not_to_be_visible()
    gateway.refusal = 401
    choose(page, *PHOTOGRAPHS[:6])
    expect(page.locator("#trouble-what")).to_have_text("Sign in to go on.")
    expect(page.locator("#trouble-when")).to_have_text("Your 6 pictures wait here.")
    page.wait_for_timeout(1_500)
    assert len(gateway.times) == 4  # nobody is asked again before somebody signed in
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Sign in").click()
    expect(opened.value).to_have_url(f"{gateway.url}/sign-in")
    opened.value.close()
    # What a window tells its page when a person comes back to it; the driver's never lose focus.
    page.evaluate("() => dispatchEvent(new Event('focus'))")
    expect(answered(page)).to_have_count(6)
    expect(page.locator("#trouble")).not_to_be_visible()
    expect(page.locator("#account")).to_contain_text("Signed in as ada")
    expect(page.get_by_role("link", name="Sign out")).to_have_attribute(
        "href", f"{gateway.url}/sign-out"
    )
    page.locator(".toggle").first.click()
    page.locator(".copy:visible").click()
    expect(page.locator(".curl:visible pre")).to_contain_text("-H 'X-API-Key: YOUR-KEY'")
    console.expect("status of 401")


def test_who_is_signed_in_shows_before_the_first_picture_and_is_text(
    open_page: Open, gateway: Gateway
) -> None:
    gateway.signed_in = "<img src=x>"
    page = open_page(gateway.url)
    expect(page.locator("#account-name")).to_have_text("<img src=x>")


# --- A network that is slow, a server that dies ---


def test_a_slow_network_shows_how_much_is_sent(page: Page) -> None:
    network = page.context.new_cdp_session(page)
    conditions = {"offline": False, "latency": 50, "downloadThroughput": -1}
    network.send("Network.emulateNetworkConditions", {**conditions, "uploadThroughput": 100_000})
    choose(page, CAT)
    progress = page.get_by_role("progressbar", name="Upload")
    expect(page.locator(".toggle")).to_have_text("Sending …")
    expect(progress).to_have_attribute("value", re.compile(r"^0\.[1-9]"))
    expect(page.locator(".guess")).to_have_count(5, timeout=30_000)
    expect(progress).not_to_be_visible()


@pytest.fixture
def hostile_archive(archive: Path, tmp_path: Path) -> Path:
    """The archive with class names that would be markup."""
    hostile = tmp_path / "store" / archive.name
    hostile.parent.mkdir()
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(hostile, "w") as changed:
        for name in good.namelist():
            content = good.read(name)
            if name == "index_to_name.json":
                rows = {key: [row[0], MARKUP] for key, row in json.loads(content).items()}
                content = json.dumps(rows).encode()
            changed.writestr(name, content)
    return hostile


MARKUP = "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'//'>"


def test_names_of_classes_and_files_cannot_become_markup_and_a_server_may_stop_and_come_back(
    open_page: Open, hostile_archive: Path, console: Console, tmp_path: Path
) -> None:
    ports, run_dir = free_ports(), tmp_path / "run"
    server = start(hostile_archive, ports, 1, run_dir)
    try:
        page = open_page(server.predictions_url)
        pictures = page.locator("main img").count()
        name = f"{MARKUP.replace('/', '')}.png"
        choose(page, payload(name))
        page.locator("#threshold").fill("0")
        expect(page.locator(".toggle")).to_have_text(MARKUP)
        expect(page.locator(".about")).to_contain_text(name)
        page.locator(".guess").first.click()
        expect(page.locator(".seen")).to_be_visible()
        expect(page.locator(".why")).to_contain_text(MARKUP)
        page.locator(".copy").click()
        page.locator("#classes summary").click()
        expect(page.locator("#class-list li").first).to_have_text(MARKUP)
        assert page.locator("main img").count() == pictures + 2
        assert page.locator("script").count() == 1
        assert page.title() == "What is in this picture?"

        # It ends while it has a picture in hand.
        worker = psutil.Process(model_status(server)["workers"][0]["pid"])
        worker.suspend()
        choose(page, CAT)
        expect(page.locator(".toggle").first).to_have_text("Looking …")
        process = server.process()
        assert process is not None
        process.kill()
        worker.kill()
        expect(page.locator("#trouble-what")).to_have_text("The server cannot be reached.")
        console.expect("net::ERR_")
        server.process()
        stop(server, run_dir)

        server = start(hostile_archive, ports, 1, run_dir)
        expect(answered(page)).to_have_count(2, timeout=40_000)
        expect(page.locator("#trouble")).not_to_be_visible()
    finally:
        stop(server, run_dir)
