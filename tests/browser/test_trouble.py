"""Error responses, outages, retries, sign-in, slow networks and hostile names."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, Route, expect

from benchmarks.archives import repack
from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.browser.conftest import Console
from tests.browser.person import (
    CAT_BYTES,
    answered,
    choose,
    expect_cat_predictions,
    payload,
    payload_of,
)
from tests.served import served

Open = Callable[..., Page]


class Gateway:
    """Serves the web UI on paths of its own, and can simulate failures.

    Attributes:
        failure: the status of all responses to images; 0 breaks the connection, None forwards the
            request.
        retry_after: the Retry-After header of these responses, in seconds.
        poison: breaks the connection of requests that contain it.
        signed_in: the X-Signed-In header; set when the page is loaded after a 401.
        times: when images arrived, in seconds.
    """

    failure: int | None = None
    retry_after: int | None = None
    poison: bytes | None = None
    signed_in: str | None = None

    def __init__(self, predictions_url: str) -> None:
        self._urls = {
            "predict": predictions_url,
            "explain": predictions_url.replace("/predictions/", "/explanations/"),
        }
        self.url = predictions_url.partition("/predictions/")[0]
        self.times: list[float] = []

    def handle(self, route: Route) -> None:
        """Respond to a request of the browser, or forward it to TorchServe."""
        path = urlsplit(route.request.url).path
        if route.request.method == "POST":
            self._classify(route, path.rsplit("/", 1)[1])
        elif path == "/v1/models":
            route.fulfill(json={"models": ["densenet121", "pets", "pets"]})
        elif path.endswith("/docs"):
            route.fulfill()
        else:
            if route.request.method == "GET" and self.failure == 401:
                # The browser prompts for credentials and loads the page with them.
                self.signed_in, self.failure = "ada", None
            self._forward(route, "predict")

    def _classify(self, route: Route, what: str) -> None:
        self.times.append(time.monotonic())
        poisoned = self.poison and self.poison in (route.request.post_data_buffer or b"")
        if self.failure == 0 or poisoned:
            route.abort()
        elif self.failure is not None:
            wait = self.retry_after
            headers = {} if wait is None else {"Retry-After": str(wait)}
            route.fulfill(status=self.failure, headers=headers)
        elif self.signed_in:
            self._forward(route, what)
        else:
            route.continue_(url=self._urls[what])

    def _forward(self, route: Route, what: str) -> None:
        """Forward a request without files on disk, and change the headers of the response."""
        response = route.fetch(url=self._urls[what])
        kept = ("content-type", "content-security-policy")
        headers = {name: response.headers[name] for name in kept if name in response.headers}
        if self.signed_in:
            headers["X-Signed-In"] = self.signed_in
        route.fulfill(response=response, headers=headers)


@pytest.fixture
def gateway(running: ServerState) -> Gateway:
    return Gateway(running.predictions_url)


@pytest.fixture
def page(open_page: Open, gateway: Gateway) -> Page:
    return open_page(gateway.url, gateway.handle)


@pytest.mark.parametrize("path", ["/", "/see/what/?a=b#c"])
def test_the_web_ui_works_on_a_gateways_own_paths(
    open_page: Open, running: ServerState, gateway: Gateway, path: str
) -> None:
    page = open_page(gateway.url + path, gateway.handle)
    choose(page, CAT)
    expect_cat_predictions(page, running)
    page.locator(".guess").first.click()
    expect(page.locator(".seen canvas")).to_be_visible()
    page.locator(".curl summary").click()
    folder = path.partition("?")[0]
    expect(page.locator(".curl pre")).to_contain_text(f"{gateway.url}{folder}predict")
    page.locator("#programs summary").click()
    expect(page.locator("#api a")).to_have_attribute("href", f"{gateway.url}{folder}docs")


def test_a_container_links_its_other_models_and_its_api_description(
    open_page: Open, gateway: Gateway
) -> None:
    page = open_page(f"{gateway.url}/predictions/densenet121", gateway.handle)
    expect(page.locator("#others")).to_have_text("Other models on this server · pets")
    link = page.get_by_role("link", name="pets")
    expect(link).to_have_attribute("href", f"{gateway.url}/predictions/pets")
    page.locator("#programs summary").click()
    expect(page.get_by_role("link", name="API description")).to_have_attribute(
        "href", f"{gateway.url}/docs"
    )


# --- Failures of one image ---


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "You may not ask this server"),
        (404, "answered with status 404"),
        (413, "larger than the server accepts"),
        (500, "failed on this image"),
    ],
)
def test_an_error_status_without_a_body_shows_a_plain_message(
    page: Page, gateway: Gateway, console: Console, status: int, message: str
) -> None:
    gateway.failure = status
    choose(page, CAT)
    expect(page.locator(".message")).to_contain_text(message)
    expect(page.locator("#trouble")).not_to_be_visible()
    expect(page.locator(".again")).to_be_visible(visible=status == 500)
    if status == 500:
        gateway.failure = None
        page.get_by_role("button", name="Try again").click()
        expect(answered(page)).to_have_count(1)
        expect(page.locator(".message")).not_to_be_visible()
    console.expect(f"status of {status}")


def test_an_image_that_always_fails_does_not_block_the_others(
    page: Page, gateway: Gateway, console: Console
) -> None:
    gateway.poison = b"never to be answered"
    choose(
        page, payload("poison.png", CAT_BYTES + gateway.poison), *map(payload_of, PHOTOGRAPHS[:3])
    )
    expect(answered(page)).to_have_count(3)
    expect(page.locator(".failed .message")).to_have_text(
        "The server answers others, but not this image.", timeout=15_000
    )
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("net::ERR_")


# --- Outages ---


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (0, "The server cannot be reached."),
        (429, "The server has too much to do."),
        (502, "The server is busy or just starting."),
    ],
)
def test_an_outage_shows_one_notice_and_the_images_are_retried(
    page: Page, gateway: Gateway, console: Console, status: int, message: str
) -> None:
    gateway.failure = status
    choose(page, *PHOTOGRAPHS[:6])
    expect(page.locator("#trouble-what")).to_have_text(message)
    expect(page.locator("#trouble-when")).to_contain_text("Your 6 images wait here; next try in")
    while len(gateway.times) < 5:  # four at first, and a retry
        page.wait_for_timeout(50)
    expect(page.locator(".failed")).to_have_count(0)
    expect(page.locator("text=" + message)).to_have_count(2)  # and in the announcer
    gateway.failure = None
    expect(answered(page)).to_have_count(6)
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("net::ERR_" if status == 0 else f"status of {status}")


def test_retries_back_off_one_at_a_time_until_the_images_are_removed(
    page: Page, gateway: Gateway, console: Console
) -> None:
    gateway.failure = 503
    choose(page, *PHOTOGRAPHS[:6])
    while len(gateway.times) < 6:
        page.wait_for_timeout(100)
    # Four were in flight; the retries came one at a time, after 1 and 2 seconds.
    began = gateway.times[0]
    for arrived, delay in zip(gateway.times[4:6], (1, 3), strict=True):
        assert arrived - began >= delay
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("status of 503")


def test_retry_after_is_respected_until_the_user_retries(
    page: Page, gateway: Gateway, console: Console, tmp_path: Path
) -> None:
    photo = tmp_path / "gone.png"
    photo.write_bytes(CAT_BYTES)
    gateway.failure, gateway.retry_after = 503, 200
    choose(page, CAT, PHOTOGRAPHS[0], photo)
    expect(page.locator("#trouble-when")).to_have_text(
        re.compile(r"Your 3 images wait here; next try in (200|19\d)\u00a0s\.")
    )
    photo.unlink()
    page.get_by_role("button", name="Remove chelsea.png").click()
    gateway.failure = None
    sent = len(gateway.times)
    page.wait_for_timeout(1_500)
    assert len(gateway.times) == sent
    page.get_by_role("button", name="Try now").click()
    expect(answered(page)).to_have_count(1)
    expect(page.locator(".message:visible")).to_contain_text("moved, changed or deleted")
    expect(page.locator("#trouble")).not_to_be_visible()
    console.expect("status of 503")
    console.expect("net::ERR_FILE_NOT_FOUND", optional=True)


# --- Sign-in ---


def test_images_are_kept_during_sign_in_and_sent_afterwards(
    page: Page, gateway: Gateway, console: Console
) -> None:
    expect(page.locator("#account")).not_to_be_visible()
    gateway.failure = 401
    choose(page, *map(payload_of, PHOTOGRAPHS[:6]))
    expect(page.locator("#trouble-what")).to_have_text("Sign in to go on.")
    page.wait_for_timeout(1_500)
    assert len(gateway.times) == 4  # no retries before sign-in
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Sign in").click()
    expect(opened.value).to_have_url(f"{gateway.url}/")
    opened.value.close()
    # Headless windows never lose focus, so the event is simulated.
    page.evaluate("() => dispatchEvent(new Event('focus'))")
    expect(answered(page)).to_have_count(6)
    expect(page.locator("#account")).to_contain_text("Signed in as ada")
    page.locator(".toggle").first.click()
    page.locator(".curl:visible summary").click()
    expect(page.locator(".curl:visible pre")).to_contain_text("-H 'X-API-Key: YOUR-KEY'")
    gateway.signed_in = "<img src=x>"
    page.reload()
    expect(page.locator("#account-name")).to_have_text("<img src=x>")
    console.expect("status of 401")


# --- Slow networks and hostile names ---


def test_a_slow_upload_shows_its_progress(page: Page) -> None:
    network = page.context.new_cdp_session(page)
    conditions = {"offline": False, "latency": 50, "downloadThroughput": -1}
    network.send("Network.emulateNetworkConditions", {**conditions, "uploadThroughput": 100_000})
    choose(page, CAT)
    progress = page.get_by_role("progressbar", name="Upload")
    expect(page.locator(".toggle")).to_have_text("Sending …")
    expect(progress).to_have_attribute("value", re.compile(r"^0\.[1-9]"))
    expect(page.locator(".guess")).to_have_count(5, timeout=30_000)
    expect(progress).not_to_be_visible()


MARKUP = "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'//'>"


def test_class_and_file_names_are_never_interpreted_as_markup(
    open_page: Open, archive: Path, tmp_path: Path
) -> None:
    def change(name: str, content: bytes) -> bytes:
        if name != "index_to_name.json":
            return content
        rows = {key: [row[0], MARKUP] for key, row in json.loads(content).items()}
        return json.dumps(rows).encode()

    hostile = repack(archive, tmp_path / archive.name, change)
    with served(hostile, tmp_path / "run") as server:
        page = open_page(server.predictions_url)
        images = page.locator("main img").count()
        name = f"{MARKUP.replace('/', '')}.png"
        choose(page, payload(name))
        page.locator("#threshold").fill("0")
        expect(page.locator(".toggle")).to_have_text(MARKUP)
        expect(page.locator(".about")).to_contain_text(name)
        page.locator(".guess").first.click()
        expect(page.locator(".seen canvas")).to_be_visible()
        expect(page.locator(".why")).to_contain_text(MARKUP)
        page.locator(".curl summary").click()
        page.locator("#classes summary").click()
        expect(page.locator("#class-list li").first).to_have_text(MARKUP)
        assert page.locator("main img").count() == images + 2
        assert page.locator("script").count() == 1
        assert page.title() == "densenet121: what is in this image?"
