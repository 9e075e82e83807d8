"""What a person can do with the page, and what can go wrong for them."""

import base64
import io
import itertools
import json
import re
import shlex
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import psutil
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import FilePayload, Page, Route, expect

from scripts.cluster import free_ports
from scripts.photographs import CAT
from scripts.server import HOST, Running, model_status, start, stop
from tests.browser.conftest import Console
from tests.pictures import PHOTOGRAPHS, encode

TIMEOUT = 60
CAT_BYTES = CAT.read_bytes()
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

Open = Callable[..., Page]


@pytest.fixture
def page(open_page: Open, running: Running) -> Page:
    return open_page(running.predictions_url)


def ask(running: Running, content: bytes = CAT_BYTES, **fields: str) -> dict[str, Any]:
    """What the server answers without a browser."""
    answer = requests.post(
        running.predictions_url, files={"file": content}, data=fields, timeout=TIMEOUT
    )
    body: dict[str, Any] = answer.json()
    return body


def explain(running: Running, **fields: str) -> dict[str, Any]:
    answer = requests.post(
        running.predictions_url.replace("/predictions/", "/explanations/"),
        files={"file": CAT_BYTES},
        data=fields,
        headers={"Accept": "application/json"},
        timeout=TIMEOUT,
    )
    body: dict[str, Any] = answer.json()
    return body


def choose(page: Page, *files: Path | FilePayload) -> None:
    page.set_input_files("#choose", list(files))  # type: ignore[arg-type]


def payload(name: str, content: bytes = CAT_BYTES, kind: str = "image/png") -> FilePayload:
    return {"name": name, "mimeType": kind, "buffer": content}


def expect_the_cats_answer(page: Page, running: Running) -> None:
    predictions = ask(running)["predictions"]
    expect(page.get_by_role("heading", level=2)).to_have_text(in_words(predictions[0]["label"]))
    names = [in_words(row["label"]) for row in predictions]
    expect(page.locator(".guess .name")).to_have_text(names)
    percentages = [f"{row['probability'] * 100:.1f} %" for row in predictions]
    expect(page.locator(".guess .percent")).to_have_text(percentages)


def in_words(label: str) -> str:
    return label.replace("_", " ")


# --- Ways in ---


def test_a_chosen_picture_is_shown_at_once_and_answered(page: Page, running: Running) -> None:
    choose(page, CAT)
    picture = page.locator(".photo img")
    expect(picture).to_have_attribute("alt", "chelsea.png")
    assert (picture.get_attribute("src") or "").startswith("blob:")
    expect_the_cats_answer(page, running)
    assert picture.evaluate("image => image.naturalWidth") == 451
    expect(page.locator(".about")).to_have_text(
        re.compile(r"^chelsea\.png, 241 kB, answered in \d+\.\d\d s$")
    )
    widths = page.locator(".guess .bar").evaluate_all("bars => bars.map(bar => bar.style.width)")
    probabilities = [row["probability"] for row in ask(running)["predictions"]]
    assert [float(width.rstrip("%")) / 100 for width in widths] == pytest.approx(
        probabilities, abs=1e-5
    )


def test_a_photographed_picture_is_answered(page: Page, running: Running) -> None:
    photograph = page.locator("#photograph")
    expect(photograph).to_have_attribute("capture", "environment")
    photograph.set_input_files(CAT)
    expect_the_cats_answer(page, running)


def test_a_dropped_picture_is_answered(page: Page, running: Running) -> None:
    transfer = page.evaluate_handle(
        """text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "cat.png", { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(CAT_BYTES).decode(),
    )
    page.dispatch_event("h1", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("dragging")
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    expect(page.locator("body")).not_to_have_class("dragging")
    expect_the_cats_answer(page, running)


def test_a_dropped_text_is_told_so(page: Page) -> None:
    transfer = page.evaluate_handle("() => new DataTransfer()")
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    expect(page.locator("#announcer")).to_contain_text("no picture file")
    expect(page.locator(".result")).to_have_count(0)


def test_a_pasted_picture_is_answered(page: Page, running: Running) -> None:
    """From the real clipboard, which holds a picture as PNG."""
    page.evaluate(
        """async text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
            const blob = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode(CAT_BYTES).decode(),
    )
    page.keyboard.press("Control+V")
    expect_the_cats_answer(page, running)


def test_a_keyboard_is_enough(page: Page, running: Running) -> None:
    # Listened for from the start: a key is faster than the driver gets ready to catch the dialog.
    page.on("filechooser", lambda chooser: chooser.set_files(CAT))
    page.keyboard.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    page.keyboard.press("Enter")
    expect_the_cats_answer(page, running)
    page.get_by_role("button", name=re.compile("^container ship")).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".seen")).to_be_visible()
    page.get_by_role("button", name="Remove chelsea.png").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".result")).to_have_count(0)
    expect(page.locator("#choose")).to_be_focused()


def test_several_pictures_are_sent_one_by_one_and_four_at_once(page: Page) -> None:
    held: list[Route] = []
    page.route("**/predictions/**", lambda route: held.append(route))  # noqa: PLW0108
    choose(page, *PHOTOGRAPHS[:10])
    expect(page.locator(".result")).to_have_count(10)
    for answered in range(10):
        expected = min(4, 10 - answered)
        while len(held) < expected:
            page.wait_for_timeout(20)
        page.wait_for_timeout(100)
        assert len(held) == expected
        held.pop(0).continue_()
        expect(page.locator(".guesses:visible")).to_have_count(answered + 1)
    names = page.locator(".about").all_text_contents()
    assert [name.split(",")[0] for name in names] == [p.name for p in PHOTOGRAPHS[9::-1]]


def test_a_picture_that_the_browser_cannot_show_is_answered_all_the_same(page: Page) -> None:
    with Image.open(CAT) as cat:
        heic = io.BytesIO()
        pillow_heif.from_pillow(cat.convert("RGB")).save(heic)
    choose(page, payload("IMG_1.HEIC", heic.getvalue(), "image/heic"))
    expect(page.locator(".placeholder")).to_have_text("IMG_1.HEIC cannot be shown by this browser")
    expect(page.locator(".guess")).to_have_count(5)


# --- Options ---


def test_threshold_and_number_of_guesses_are_the_persons_choice(
    page: Page, running: Running
) -> None:
    expect(page.locator("#threshold")).to_have_value("0.1")
    choose(page, CAT)
    heading = page.get_by_role("heading", level=2)
    expect_the_cats_answer(page, running)
    for threshold in ("0.99", "0.13", "0.12", "0"):
        page.locator("#threshold").fill(threshold)
        body = ask(running, threshold=threshold)
        words = in_words(body["class_name"]) if body["recognized"] else "Nothing recognised"
        expect(heading).to_have_text(words)
    page.get_by_label("Guesses shown").select_option("10")
    names = [in_words(row["label"]) for row in ask(running, topk="10")["predictions"]]
    expect(page.locator(".guess .name")).to_have_text(names)
    page.get_by_label("Guesses shown").select_option("1")
    expect(page.locator(".guess")).to_have_count(1)


HARMLESS = ("cat.png", "two words.png", "\u732b \u00fcber.png", "@cat.png", "~", "a&b=c%20.png")
HOSTILE = (
    "$(touch pwned).png",
    "`touch pwned`.png",
    "'; touch pwned; '.png",
    '"; touch pwned; ".png',
    "-o pwned",
    "-",
    'a;type=text,b"c\\d.png',
    "cat.png;filename=x",
    "#!*?[a].png",
    "<img src=x onerror=alert(1)>.png",
)


def test_the_copied_command_works_in_a_shell(page: Page, running: Running, tmp_path: Path) -> None:
    page.locator("#threshold").fill("0.5")
    page.get_by_label("Guesses shown").select_option("3")
    expected = ask(running, topk="3", threshold="0.5")
    for name in (*HARMLESS, *HOSTILE):
        (tmp_path / name).write_bytes(CAT_BYTES)
        choose(page, payload(name))
        page.locator(".copy").first.click()
        expect(page.locator(".curl p").first).to_contain_text("Copied.")
        command = page.evaluate("() => navigator.clipboard.readText()")
        assert command == page.locator(".curl pre").first.text_content()
        result = subprocess.run(
            ["sh", "-c", command],  # noqa: S607
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        assert json.loads(result.stdout) == expected, name
    assert {path.name for path in tmp_path.iterdir()} == {*HARMLESS, *HOSTILE}


def test_a_name_that_could_control_a_terminal_is_not_copied(page: Page) -> None:
    choose(page, payload("a\x1b[201~\ntouch pwned\n.png"))
    page.locator(".copy").click()
    command = page.locator(".curl pre").text_content() or ""
    assert "NAME-OF-THE-FILE" in command
    assert command.isprintable()
    assert "pwned" not in shlex.split(command)


# --- Why ---


def test_each_guess_shows_where(page: Page, running: Running, console: Console) -> None:
    choose(page, CAT)
    expect(page.locator(".guess")).to_have_count(5)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    drawings = set()
    for row in ask(running)["predictions"]:
        guess = page.get_by_role("button", name=re.compile(f"^{in_words(row['label'])}"))
        guess.click()
        expect(guess).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".guess[aria-pressed=true]")).to_have_count(1)
        expect(page.locator(".why")).to_contain_text(f"\u201c{in_words(row['label'])}\u201d")
        explanation = explain(running, class_index=str(row["class_index"]))
        photo, seen = (page.locator(name).bounding_box() for name in (".photo", ".seen"))
        assert photo is not None
        assert seen is not None
        scale = photo["width"] / explanation["image"]["width"]
        crop = explanation["crop"]
        assert (seen["x"] - photo["x"], seen["y"] - photo["y"]) == pytest.approx(
            (crop["left"] * scale, crop["top"] * scale), abs=0.6
        )
        assert (seen["width"], seen["height"]) == pytest.approx(
            ((crop["right"] - crop["left"]) * scale, (crop["bottom"] - crop["top"]) * scale),
            abs=0.6,
        )
        heat = drawn_heat(page)
        drawings.add(heat.tobytes())
        activation = np.array(explanation["map"])
        relative = (activation - activation.min()) / (activation.max() - activation.min())
        # The middle of each of the 7x7 cells; that of 32 pixels lies between two.
        assert heat[16::32, 16::32] / 255 == pytest.approx(relative, abs=0.05)
    console.expect("willReadFrequently")  # the test's own reading of the canvas
    assert len(drawings) == 5
    assert len(asked) == 5
    page.locator(".guess").first.click()
    expect(page.locator(".guess").first).to_have_attribute("aria-pressed", "true")
    assert len(asked) == 5


def drawn_heat(page: Page) -> np.ndarray:
    """The opacity of what the canvas shows: uint8 (224, 224)."""
    alpha = page.locator(".seen canvas").evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, 224, 224);
            return Array.from(data.filter((_, i) => i % 4 === 3));
        }"""
    )
    return np.array(alpha, np.uint8).reshape(224, 224)


def test_the_overlay_can_be_faded_and_switched_off(page: Page) -> None:
    choose(page, CAT)
    page.locator(".guess").first.click()
    canvas = page.locator(".seen canvas")
    expect(canvas).to_be_visible()
    page.get_by_label("Strength").fill("0.25")
    expect(canvas).to_have_css("opacity", "0.25")
    page.get_by_label("Show where").uncheck()
    expect(canvas).not_to_be_visible()
    page.get_by_label("Show where").check()
    expect(canvas).to_be_visible()


# --- Behind a gateway ---


class Gateway(BaseHTTPRequestHandler):
    """Has the page at `/` of a path of its own; below `/status/CODE/` it answers for itself."""

    predictions_url: str

    def do_GET(self) -> None:
        self.answer(requests.get(self.predictions_url, headers=self.accept(), timeout=TIMEOUT))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        refusal = re.match(r"/status/(\d+)/", self.path)
        if refusal:
            self.send_response(int(refusal[1]))
            self.end_headers()
            return
        name = self.path.rsplit("/", 1)[1]
        url = {
            "predict": self.predictions_url,
            "explain": self.predictions_url.replace("/predictions/", "/explanations/"),
        }[name]
        headers = {**self.accept(), "Content-Type": self.headers["Content-Type"]}
        self.answer(requests.post(url, data=body, headers=headers, timeout=TIMEOUT))

    def accept(self) -> dict[str, str]:
        return {"Accept": self.headers["Accept"]}

    def answer(self, answer: requests.Response) -> None:
        self.send_response(answer.status_code)
        for name in ("Content-Type", "Content-Security-Policy"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output clean."""


@pytest.fixture
def gateway(running: Running) -> Iterator[str]:
    handler = type("Handler", (Gateway,), {"predictions_url": running.predictions_url})
    with ThreadingHTTPServer((HOST, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{HOST}:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/", "/see/what/?a=b#c"])
def test_the_page_works_at_a_gateways_own_paths(
    open_page: Open, running: Running, gateway: str, path: str
) -> None:
    page = open_page(gateway + path)
    choose(page, CAT)
    expect_the_cats_answer(page, running)
    page.locator(".guess").first.click()
    expect(page.locator(".seen")).to_be_visible()
    page.locator(".copy").click()
    folder = path.partition("?")[0]
    expect(page.locator(".curl pre")).to_contain_text(f"{gateway}{folder}predict")


@pytest.mark.parametrize(
    "refusal",
    [
        (401, "asks for a key", False),
        (404, "answered with status 404", False),
        (413, "larger than the server accepts", False),
        (429, "server is busy", True),
        (502, "failed on this picture", True),
        (503, "server is busy", True),
    ],
)
def test_a_refusal_of_another_servers_is_put_in_plain_words(
    open_page: Open, gateway: str, console: Console, refusal: tuple[int, str, bool]
) -> None:
    status, words, again = refusal
    page = open_page(f"{gateway}/status/{status}/")
    choose(page, CAT)
    expect(page.locator(".message")).to_contain_text(words)
    expect(page.locator(".again")).to_be_visible(visible=again)
    console.expect(f"status of {status}")


# --- What goes wrong ---


def test_a_file_that_is_no_picture_is_answered_with_the_servers_words(
    page: Page, running: Running, console: Console
) -> None:
    notes = b"These are notes. " * 30
    choose(page, payload("notes.txt", notes, "text/plain"))
    expect(page.locator(".message")).to_have_text(ask(running, notes)["message"])
    expect(page.locator(".again")).not_to_be_visible()
    console.expect("status of 400")


def test_a_file_that_is_too_large_is_not_even_sent(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(20_971_520))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.method))
    choose(page, large)
    expect(page.locator(".message")).to_contain_text("larger than the 20 MB")
    assert asked.count("POST") == 0


def test_a_large_photo_is_sent_as_it_is(page: Page, running: Running) -> None:
    """No smaller copy that a browser makes is the same picture to the model."""
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)
    photo = encode(Image.fromarray(noise))
    assert 15_000_000 < len(photo) < 20_000_000
    choose(page, payload("noise.png", photo))
    names = [in_words(row["label"]) for row in ask(running, photo)["predictions"]]
    expect(page.locator(".guess .name")).to_have_text(names, timeout=30_000)


def test_a_slow_network_shows_how_much_is_sent(page: Page) -> None:
    network = page.context.new_cdp_session(page)
    conditions = {"offline": False, "latency": 50, "downloadThroughput": -1}
    network.send("Network.emulateNetworkConditions", {**conditions, "uploadThroughput": 100_000})
    choose(page, CAT)
    progress = page.locator("progress")
    expect(page.get_by_role("heading", level=2)).to_have_text("Sending …")
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


MARKUP = "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'//"


def test_names_of_classes_and_files_cannot_become_markup_and_a_server_may_stop_and_come_back(
    open_page: Open, hostile_archive: Path, console: Console, tmp_path: Path
) -> None:
    ports, run_dir = free_ports(), tmp_path / "run"
    server = start(hostile_archive, ports, 1, run_dir)
    try:
        page = open_page(server.predictions_url)
        name = f"{MARKUP.replace('/', '')}.png"
        choose(page, payload(name))
        page.locator("#threshold").fill("0")
        expect(page.get_by_role("heading", level=2)).to_have_text(MARKUP)
        expect(page.locator(".about")).to_contain_text(name)
        page.locator(".guess").first.click()
        expect(page.locator(".why")).to_contain_text(MARKUP)
        page.locator(".copy").click()
        assert page.locator("main img").count() == 1
        assert page.locator("script").count() == 1
        assert page.title() == "What is in this picture?"

        # It ends while it has a picture in hand.
        worker = psutil.Process(model_status(server)["workers"][0]["pid"])
        worker.suspend()
        choose(page, CAT)
        expect(page.get_by_role("heading", level=2).first).to_have_text("Looking …")
        process = server.process()
        assert process is not None
        process.kill()
        worker.kill()
        expect(page.locator(".message").first).to_contain_text("cannot be reached")
        console.expect("net::ERR_")
        server.process()
        stop(server, run_dir)

        server = start(hostile_archive, ports, 1, run_dir)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".message").first).not_to_be_visible()
        expect(page.locator(".result").first.locator(".guess")).to_have_count(5)
    finally:
        stop(server, run_dir)


# --- For everybody ---


def everything(page: Page) -> None:
    """Each state that a picture can be in, on one page."""
    choose(page, payload("notes.txt", b"These are notes. " * 30, "text/plain"))
    expect(page.locator(".failed")).to_have_count(1)
    choose(page, PHOTOGRAPHS[5])
    expect(page.locator(".guesses:visible")).to_have_count(1)
    choose(page, CAT)
    expect(page.locator(".guesses:visible")).to_have_count(2)
    page.locator(".guess").first.click()
    expect(page.locator(".seen").first).to_be_visible()
    page.locator(".copy").first.click()
    expect(page.locator(".curl").first).to_be_visible()


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE],
    ids=["light", "dark", "phone"],
)
def test_axe_finds_nothing(
    open_page: Open, running: Running, console: Console, options: dict[str, Any]
) -> None:
    # axe works with means that the page's policy rightly denies.
    page = open_page(running.predictions_url, bypass_csp=True, **options)
    for state in ("empty", "full"):
        if state == "full":
            everything(page)
            console.expect("status of 400")
        results = Axe().run(page)
        assert results.violations_count == 0, (state, results.generate_report())
        # It looked: colours and names are what it is for.
        passed = {rule["id"] for rule in results.response["passes"]}
        assert {"color-contrast", "label", "button-name"} <= passed or state == "empty"


def test_light_and_dark_follow_the_system(open_page: Open, running: Running) -> None:
    grounds = [
        open_page(running.predictions_url, color_scheme=scheme)
        .locator("body")
        .evaluate("body => getComputedStyle(body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    brightness = [sum(map(int, re.findall(r"\d+", ground))) for ground in grounds]
    assert brightness[0] > 600
    assert brightness[1] < 150


def test_nothing_is_wider_than_a_phone(open_page: Open, running: Running, console: Console) -> None:
    page = open_page(running.predictions_url, **PHONE)
    expect(page.get_by_text("Take a photo")).to_be_visible()
    everything(page)
    console.expect("status of 400")
    choose(page, payload("a" * 200 + ".png"))
    expect(page.locator(".guesses:visible")).to_have_count(3)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    boxes = [e.bounding_box() for e in page.get_by_role("button").all()]
    assert all(box is not None and box["x"] + box["width"] <= 390 for box in boxes)


def test_untrained_weights_are_told_before_the_first_answer(page: Page) -> None:
    expect(page.get_by_role("note")).to_contain_text("Untrained random weights")


def test_the_page_talks_to_its_own_server_only(page: Page, running: Running) -> None:
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.reload()
    everything_but_errors = itertools.islice(PHOTOGRAPHS, 2)
    choose(page, *everything_but_errors)
    expect(page.locator(".guesses:visible")).to_have_count(2)
    page.locator(".guess").first.click()
    expect(page.locator(".seen").first).to_be_visible()
    # A picture's own address is blob:http://..., from the browser's memory.
    assert {host for host in hosts if host} == {f"{HOST}:{running.ports.inference}"}
