"""The web UI with one image: adding it, options, code examples, heat maps and files."""

import base64
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import requests
from PIL import Image
from playwright.sync_api import Page, expect

from handler.settings import MAX_REQUEST_BYTES
from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.browser.person import (
    CAT_BYTES,
    NOTES,
    TIMEOUT,
    answered,
    choose,
    display_name,
    expect_cat_predictions,
    payload,
    predict,
)
from tests.images import encode

pytestmark = pytest.mark.slow

Open = Callable[..., Page]
CAT_BASE64 = base64.b64encode(CAT_BYTES).decode()


# --- Adding images ---


def drop(page: Page, data: dict[str, str], *files: tuple[str, bytes]) -> None:
    """Drop text by MIME type, and files."""
    transfer = page.evaluate_handle(
        """({ data, files }) => {
            const transfer = new DataTransfer();
            for (const [type, text] of Object.entries(data)) transfer.setData(type, text);
            for (const [name, text] of files) {
                const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/png" }));
            }
            return transfer;
        }""",
        {"data": data, "files": [(name, base64.b64encode(c).decode()) for name, c in files]},
    )
    page.dispatch_event("h1", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("dragging")
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    expect(page.locator("body")).not_to_have_class("dragging")


def paste_text(page: Page, text: str) -> None:
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.keyboard.press("Control+V")


def photograph(page: Page) -> None:
    expect(page.locator("#photograph")).to_have_attribute("capture", "environment")
    page.locator("#photograph").set_input_files(CAT)


def drop_from_another_page(page: Page) -> None:
    """Drop an image with its URL, which is ignored."""
    drop(page, {"text/uri-list": "https://example.org/cat.png"}, ("cat.png", CAT_BYTES))


def paste_image(page: Page) -> None:
    """Paste an image from the clipboard."""
    page.evaluate(
        """async text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
            const blob = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        CAT_BASE64,
    )
    page.keyboard.press("Control+V")


def paste_data_url(page: Page) -> None:
    paste_text(page, "a cat")
    expect(page.locator("#notice")).to_contain_text("That was text and no image.")
    paste_text(page, f"data:image/png;base64,{CAT_BASE64}")


@pytest.mark.parametrize("add", [photograph, drop_from_another_page, paste_image, paste_data_url])
def test_every_way_to_add_an_image_returns_predictions(
    page: Page, running: ServerState, add: Callable[[Page], None]
) -> None:
    add(page)
    expect_cat_predictions(page, running)
    expect(page.locator("#notice")).to_contain_text("up to 20 MB each")


def test_a_sample_image_can_be_classified(page: Page, running: ServerState) -> None:
    assert page.locator(".samples button:visible").count() == 3
    sample = page.get_by_role("button", name="coffee")
    source = sample.locator("img").get_attribute("src") or ""
    sample.click()
    best = predict(running, base64.b64decode(source.partition(",")[2]))["predictions"]
    expect(page.locator(".guess .name")).to_have_text([display_name(row["label"]) for row in best])
    expect(page.locator(".about")).to_contain_text("coffee.webp")
    assert page.locator(".photo img").evaluate("image => image.naturalWidth") == 384


def test_a_webcam_photo_is_classified_once_permission_is_granted(page: Page) -> None:
    webcam = page.get_by_role("button", name="Webcam")
    webcam.click()
    expect(page.locator("#notice")).to_contain_text("does not allow this page to use the webcam")
    page.context.grant_permissions(["camera"])
    webcam.click()
    expect(page.locator("#video")).not_to_have_js_property("videoWidth", 0)
    page.get_by_role("button", name="Take the photo").click()
    expect(page.locator("#camera")).not_to_be_visible()
    expect(page.locator("#video")).to_have_js_property("srcObject", None)
    expect(answered(page)).to_have_count(1)
    expect(page.locator(".file")).to_have_text("webcam.jpg")


def test_a_drop_without_an_image_shows_a_visible_message(page: Page) -> None:
    place = page.locator(".drop").bounding_box()
    for data, message in (
        ({"text/plain": "a cat"}, "That was text and no image. Drop or paste image files"),
        ({"text/uri-list": "https://example.org/cat.png"}, "That was a link"),
        ({"text/plain": "data:image/png;base64,!"}, "That was text and no image."),
        ({}, "That was no image."),
    ):
        drop(page, data)
        expect(page.locator("#notice")).to_contain_text(message)
        expect(page.locator("#notice")).to_be_in_viewport()
        expect(page.locator("#announcer")).to_contain_text(message)
        assert page.locator(".drop").bounding_box() == place
    expect(page.locator(".result")).to_have_count(0)


def test_the_server_renders_an_image_that_the_browser_cannot_decode(
    page: Page, running: ServerState
) -> None:
    with Image.open(CAT) as cat:
        heic = io.BytesIO()
        pillow_heif.from_pillow(cat.convert("RGB")).save(heic)
    choose(page, payload("IMG_1.HEIC", heic.getvalue(), "image/heic"))
    expect(page.locator(".guess")).to_have_count(5)
    expect(page.locator(".guess").first).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".photo img")).to_be_visible()
    expect(page.locator(".placeholder")).not_to_be_visible()
    size = "image => [image.naturalWidth, image.naturalHeight]"
    assert page.locator(".photo img").evaluate(size) == [451, 300]
    best = predict(running, heic.getvalue())["predictions"][0]["label"]
    expect(page.locator(".why")).to_contain_text(f"\u201c{display_name(best)}\u201d")
    page.locator(".guess").first.click()
    expect(page.locator(".placeholder")).to_have_text("IMG_1.HEIC cannot be shown by this browser")
    page.locator(".guess").nth(1).click()
    expect(page.locator(".photo img")).to_be_visible()


# --- Options ---


def test_results_match_the_controls_that_the_browser_restores(page: Page) -> None:
    page.locator("#threshold").fill("0.5")
    page.get_by_label("Predictions shown").select_option("3")
    page.goto("about:blank")
    page.go_back()
    expect(page.locator("#threshold")).to_have_value("0.5")
    expect(page.locator("#threshold-shown")).to_have_text("50% sure")
    choose(page, CAT)
    expect(page.locator(".guess")).to_have_count(3)
    expect(page.locator(".toggle")).to_have_text("Not recognized")


# --- Code examples ---

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


def run(command: list[str], folder: Path) -> str:
    return subprocess.check_output(command, cwd=folder, text=True)


def test_the_copied_curl_command_works_for_any_file_name(
    page: Page, running: ServerState, tmp_path: Path
) -> None:
    page.locator("#threshold").fill("0.5")
    page.get_by_label("Predictions shown").select_option("3")
    expected = predict(running, topk="3", threshold="0.5")
    for name in (*HARMLESS, *HOSTILE):
        (tmp_path / name).write_bytes(CAT_BYTES)
        choose(page, payload(name))
        page.locator(".curl:visible summary").click()
        page.locator(".copy:visible").click()
        expect(page.locator(".copied:visible")).to_have_count(1)
        command = page.evaluate("() => navigator.clipboard.readText()")
        assert command == page.locator(".curl:visible pre").text_content()
        assert json.loads(run(["sh", "-c", command], tmp_path)) == expected, name
    assert {path.name for path in tmp_path.iterdir()} == {*HARMLESS, *HOSTILE}
    # A name with control characters is not copied.
    choose(page, payload("a\x1b[201~\ntouch pwned\n.png"))
    page.locator(".curl:visible summary").click()
    command = page.locator(".curl:visible pre").text_content() or ""
    assert "NAME-OF-THE-FILE" in command
    assert command.isprintable()
    assert "pwned" not in shlex.split(command)


def test_the_code_examples_run_unchanged(page: Page, running: ServerState, tmp_path: Path) -> None:
    page.get_by_label("Predictions shown").select_option("3")
    page.get_by_text("Use it from a program").click()
    with Image.open(CAT) as cat:
        jpeg = encode(cat.convert("RGB"), "JPEG")
    (tmp_path / "cat.jpg").write_bytes(jpeg)
    best = predict(running, jpeg, topk="3")["predictions"]
    texts = (page.locator(f"#programs {tag}").all_text_contents() for tag in ("h3", "pre"))
    codes = dict(zip(*texts, strict=True))
    assert json.loads(run(["sh", "-c", codes["curl"]], tmp_path))["predictions"] == best
    printed = run([sys.executable, "-c", codes["Python"]], tmp_path)
    assert [line.split(" ", 1)[1] for line in printed.splitlines()] == [r["label"] for r in best]
    predictions = page.evaluate(
        f"""async text => {{
            const image = new Blob([Uint8Array.from(atob(text), c => c.charCodeAt(0))]);
            {codes["JavaScript"]}
            return predictions;
        }}""",
        base64.b64encode(jpeg).decode(),
    )
    assert predictions == best
    page.get_by_role("button", name="Copy Python").click()
    expect(page.locator(".copied pre")).to_have_text(codes["Python"])
    expect(page.locator("#announcer")).to_have_text("Copied.")
    assert page.evaluate("() => navigator.clipboard.readText()") == codes["Python"]


# --- The model ---


def test_the_model_is_shown_and_its_classes_searched(page: Page, running: ServerState) -> None:
    headers = requests.get(
        running.predictions_url, headers={"Accept": "text/html"}, timeout=TIMEOUT
    ).headers
    expect(page).to_have_title("densenet121: what is in this image?")
    expect(page.locator("#model")).to_have_text("densenet121")
    version = headers["X-Model-Version"]
    expect(page.locator("#facts")).to_have_text(f"· 1,000 classes · version {version} · float32")
    # TorchServe's own port has no list of models and no API description.
    for part in ("#others", "#api"):
        expect(page.locator(part)).to_have_attribute("hidden", "")
    page.get_by_text("All 1,000 classes").click()
    rows = json.loads(Path("handler/index_to_name.json").read_text()).values()
    expect(page.locator("#class-list li")).to_have_text([display_name(name) for _, name in rows])
    page.get_by_label("Find a class").focus()
    paste_text(page, "Egyptian_C")  # text is allowed in the search field
    expect(page.locator("#notice")).to_contain_text("up to 20 MB each")
    expect(page.locator("#class-list li:visible")).to_have_text(["Egyptian cat"])
    expect(page.locator("#found")).to_have_text("1 found")


def test_the_web_ui_works_on_all_model_paths_but_not_at_the_root(
    open_page: Open, running: ServerState
) -> None:
    origin = running.predictions_url.partition("/predictions")[0]
    for path in ("/invocations", "/explanations/densenet121"):
        page = open_page(origin + path)
        choose(page, CAT)
        expect_cat_predictions(page, running)
        page.locator(".guess").first.click()
        expect(page.locator(".seen canvas")).to_be_visible()
    # TorchServe's frontend handles `/` itself; the README has the URL to open instead.
    root = requests.get(f"{origin}/", headers={"Accept": "text/html"}, timeout=TIMEOUT)
    assert root.status_code == 405


# --- Heat maps ---


def expect_no_heat_map(page: Page) -> None:
    expect(page.locator(".seen canvas")).not_to_be_visible()
    expect(page.locator(".legend")).not_to_be_visible()
    expect(page.locator(".guess[aria-pressed=true]")).to_have_count(0)
    expect(page.locator(".photo img")).to_have_css("filter", "none")


def test_a_heat_map_in_the_frame_of_the_models_input_is_removed_with_its_prediction(
    page: Page,
) -> None:
    choose(page, CAT)
    expect(page.get_by_text("The model sees only what is inside the frame.")).to_be_visible()
    position = "seen => [seen.offsetLeft, seen.offsetTop, seen.offsetWidth, seen.offsetHeight]"
    before = page.locator(".seen").evaluate(position)
    prediction = page.locator(".guess").nth(2)
    prediction.click()
    expect(page.locator(".legend")).to_be_visible()
    assert page.locator(".seen").evaluate(position) == pytest.approx(before, abs=1)
    page.get_by_label("Opacity of the colors").fill("0.25")
    expect(page.locator(".seen canvas")).to_have_css("opacity", "0.25")
    page.locator("#threshold").fill("0.9")
    page.get_by_label("Predictions shown").select_option("3")
    expect(page.locator(".seen canvas")).to_be_visible()
    expect(prediction).to_have_attribute("aria-pressed", "true")
    prediction.click()
    expect_no_heat_map(page)
    prediction.click()
    expect(page.locator(".seen canvas")).to_be_visible()
    page.get_by_label("Predictions shown").select_option("1")
    expect_no_heat_map(page)


def test_a_late_heat_map_response_is_ignored(page: Page) -> None:
    choose(page, CAT)
    expect(page.locator(".guess")).to_have_count(5)
    page.route("**/explanations/**", lambda route: route.continue_())
    with page.expect_response("**/explanations/**"):
        page.locator(".guess").first.click()
        page.locator(".guess").first.click()
    page.wait_for_timeout(200)
    expect_no_heat_map(page)


# --- Files ---


def test_a_large_photo_is_sent_unchanged_and_one_above_the_limit_is_rejected(
    page: Page, running: ServerState, tmp_path: Path
) -> None:
    """Resizing in the browser would change the predictions."""
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)
    photo = encode(Image.fromarray(noise))
    assert 15_000_000 < len(photo) < MAX_REQUEST_BYTES
    methods: list[str] = []
    page.on("request", lambda request: methods.append(request.method))
    choose(page, payload("noise.png", photo))
    names = [display_name(row["label"]) for row in predict(running, photo)["predictions"]]
    expect(page.locator(".guess .name")).to_have_text(names)
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(MAX_REQUEST_BYTES))
    choose(page, large)
    expect(page.locator(".message:visible")).to_contain_text("larger than the 20 MB")
    assert methods.count("POST") == 1


def test_a_file_that_changed_after_it_was_chosen_is_reported(page: Page, tmp_path: Path) -> None:
    photo = tmp_path / "cat.png"
    photo.write_bytes(CAT_BYTES)
    choose(page, photo)
    expect(page.locator(".guess")).to_have_count(5)
    photo.write_bytes(CAT_BYTES + b"more")
    page.locator(".guess").first.click()
    expect(page.locator(".why")).to_contain_text("moved, changed or deleted after it was chosen")
    expect(page.locator(".guess[aria-pressed=true]")).to_have_count(0)


def drop_from_disk(page: Page, path: Path) -> None:
    """Drop a path as from a file manager, so the web UI can read the folder."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})


def test_the_images_in_a_dropped_folder_are_classified(page: Page, tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "notes.txt").write_bytes(NOTES)
    drop_from_disk(page, tmp_path / "papers")
    expect(page.locator("#notice")).to_contain_text("There is no image in this folder")
    expect(page.locator(".result")).to_have_count(0)
    folder = tmp_path / "holidays"
    (folder / "more").mkdir(parents=True)
    for name in ("10.png", "9.png", "more/11.PNG"):
        (folder / name).write_bytes(CAT_BYTES)
    for name in ("notes.txt", ".hidden.png"):
        (folder / name).write_bytes(NOTES)
    drop_from_disk(page, folder)
    expect(answered(page)).to_have_count(3)
    assert page.locator(".file").all_text_contents() == ["9.png", "10.png", "11.PNG"]
    expect(page.locator("#notice")).to_have_text("Took 3 images; left out 2 other files.")
