"""What a person can do with the page and one picture."""

import base64
import io
import json
import re
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
from scripts.serve.running import Running
from tests.browser.conftest import Console
from tests.browser.person import (
    CAT_BYTES,
    NOTES,
    TIMEOUT,
    answered,
    ask,
    choose,
    expect_the_cats_answer,
    explain,
    in_words,
    payload,
)
from tests.pictures import encode

Open = Callable[..., Page]


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


def test_somebody_without_a_picture_can_try_a_sample(page: Page, running: Running) -> None:
    samples = page.locator(".samples button")
    assert samples.count() == 4
    sample = page.get_by_role("button", name="coffee")
    source = sample.locator("img").get_attribute("src") or ""
    sample.click()
    content = base64.b64decode(source.partition(",")[2])
    best = ask(running, content)["predictions"]
    expect(page.locator(".guess .name")).to_have_text([in_words(row["label"]) for row in best])
    expect(page.locator(".about")).to_contain_text("coffee.webp")
    assert page.locator(".photo img").evaluate("image => image.naturalWidth") == 384


def drop(page: Page, data: dict[str, str], *files: tuple[str, bytes]) -> None:
    """Drops text of some types, and files."""
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


def test_a_dropped_picture_is_answered(page: Page, running: Running) -> None:
    drop(page, {}, ("cat.png", CAT_BYTES))
    expect_the_cats_answer(page, running)


def test_a_picture_dragged_from_another_page_is_taken_and_not_its_address(
    page: Page, running: Running
) -> None:
    drop(page, {"text/uri-list": "https://example.org/cat.png"}, ("cat.png", CAT_BYTES))
    expect_the_cats_answer(page, running)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"text/plain": "a cat"}, "That was text and no picture. Drop or paste picture files"),
        ({"text/uri-list": "https://example.org/cat.png"}, "That was a link"),
        ({"text/plain": "data:image/png;base64,!"}, "That was text and no picture."),
        ({}, "That was no picture."),
    ],
)
def test_what_is_dropped_and_no_picture_is_answered_where_it_is_seen(
    page: Page, data: dict[str, str], words: str
) -> None:
    height = page.locator(".drop").bounding_box()
    drop(page, data)
    expect(page.locator("#notice")).to_contain_text(words)
    expect(page.locator("#notice")).to_be_in_viewport()
    expect(page.locator("#announcer")).to_contain_text(words)
    expect(page.locator(".result")).to_have_count(0)
    assert page.locator(".drop").bounding_box() == height


def paste_text(page: Page, text: str) -> None:
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.keyboard.press("Control+V")


def test_pasted_text_is_answered_too_and_a_picture_in_it_is_taken(
    page: Page, running: Running
) -> None:
    paste_text(page, "a cat")
    expect(page.locator("#notice")).to_contain_text("That was text and no picture.")
    paste_text(page, f"data:image/png;base64,{base64.b64encode(CAT_BYTES).decode()}")
    expect_the_cats_answer(page, running)
    expect(page.locator("#notice")).to_contain_text("up to 20 MB each")


def test_text_can_be_pasted_where_one_types(page: Page) -> None:
    page.locator("#classes summary").click()
    page.locator("#search").focus()
    paste_text(page, "tabby")
    expect(page.locator("#search")).to_have_value("tabby")
    expect(page.locator("#notice")).to_contain_text("up to 20 MB each")


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
    page.locator(".toggle").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".body")).not_to_be_visible()
    page.get_by_role("button", name="Remove chelsea.png").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".result")).to_have_count(0)
    expect(page.locator("#choose")).to_be_focused()


def test_a_picture_that_the_browser_cannot_show_is_shown_by_the_server(
    page: Page, running: Running
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
    best = ask(running, heic.getvalue())["predictions"][0]["label"]
    expect(page.locator(".why")).to_contain_text(f"\u201c{in_words(best)}\u201d")
    page.locator(".guess").first.click()
    expect(page.locator(".placeholder")).to_have_text("IMG_1.HEIC cannot be shown by this browser")
    page.locator(".guess").nth(1).click()
    expect(page.locator(".photo img")).to_be_visible()


# --- Options ---


def test_threshold_and_number_of_guesses_are_the_persons_choice(
    page: Page, running: Running
) -> None:
    expect(page.locator("#threshold")).to_have_value("0.1")
    expect(page.locator("#threshold-shown")).to_have_text("10.0 % sure")
    choose(page, CAT)
    expect_the_cats_answer(page, running)
    for threshold in ("0.99", "0.13", "0.12", "0"):
        page.locator("#threshold").fill(threshold)
        body = ask(running, threshold=threshold)
        words = in_words(body["class_name"]) if body["recognized"] else "Not recognised"
        expect(page.locator(".toggle")).to_have_text(words)
        expect(page.locator(".unsure")).to_be_visible(visible=not body["recognized"])
    page.get_by_label("Guesses shown").select_option("10")
    names = [in_words(row["label"]) for row in ask(running, topk="10")["predictions"]]
    expect(page.locator(".guess .name")).to_have_text(names)
    page.get_by_label("Guesses shown").select_option("1")
    expect(page.locator(".guess")).to_have_count(1)


@pytest.mark.parametrize("way", ["back", "reload"])
def test_controls_and_results_agree_when_the_browser_fills_the_controls_in_again(
    page: Page, way: str
) -> None:
    page.locator("#threshold").fill("0.5")
    page.get_by_label("Guesses shown").select_option("3")
    if way == "back":
        page.goto("about:blank")
        page.go_back()
    else:
        page.reload()
    choose(page, CAT)
    expect(answered(page)).to_have_count(1)
    threshold = float(page.locator("#threshold").input_value())
    expect(page.locator("#threshold-shown")).to_have_text(f"{threshold * 100:.1f} % sure")
    guesses = int(page.get_by_label("Guesses shown").input_value())
    expect(page.locator(".guess")).to_have_count(guesses)
    recognised = page.locator(".toggle").text_content() != "Not recognised"
    assert recognised == (threshold < 0.12)
    if way == "back":
        # Otherwise the browser has filled in nothing, and this has shown nothing.
        assert (threshold, guesses) == (0.5, 3)


# --- Programs ---

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
    return subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True).stdout


def test_the_copied_command_works_in_a_shell(page: Page, running: Running, tmp_path: Path) -> None:
    page.locator("#threshold").fill("0.5")
    page.get_by_label("Guesses shown").select_option("3")
    expected = ask(running, topk="3", threshold="0.5")
    for name in (*HARMLESS, *HOSTILE):
        (tmp_path / name).write_bytes(CAT_BYTES)
        choose(page, payload(name))
        page.locator(".copy:visible").click()
        expect(page.locator(".curl:visible p")).to_contain_text("Copied.")
        command = page.evaluate("() => navigator.clipboard.readText()")
        assert command == page.locator(".curl:visible pre").text_content()
        assert json.loads(run(["sh", "-c", command], tmp_path)) == expected, name
    assert {path.name for path in tmp_path.iterdir()} == {*HARMLESS, *HOSTILE}


def test_a_name_that_could_control_a_terminal_is_not_copied(page: Page) -> None:
    choose(page, payload("a\x1b[201~\ntouch pwned\n.png"))
    page.locator(".copy").click()
    command = page.locator(".curl pre").text_content() or ""
    assert "NAME-OF-THE-FILE" in command
    assert command.isprintable()
    assert "pwned" not in shlex.split(command)


def test_the_examples_for_programs_run_as_they_stand(
    page: Page, running: Running, tmp_path: Path
) -> None:
    page.get_by_label("Guesses shown").select_option("3")
    page.get_by_text("Use it from a program").click()
    with Image.open(CAT) as cat:
        (tmp_path / "cat.jpg").write_bytes(encode(cat.convert("RGB"), "JPEG"))
    best = ask(running, (tmp_path / "cat.jpg").read_bytes(), topk="3")["predictions"]
    codes = dict(
        zip(
            page.locator("#programs h3").all_text_contents(),
            page.locator("#programs pre").all_text_contents(),
            strict=True,
        )
    )
    assert json.loads(run(["sh", "-c", codes["curl"]], tmp_path))["predictions"] == best
    printed = run([sys.executable, "-c", codes["Python"]], tmp_path)
    assert [line.split(" ", 1)[1] for line in printed.splitlines()] == [r["label"] for r in best]
    given = page.evaluate(
        f"""async text => {{
            const picture = new Blob([Uint8Array.from(atob(text), c => c.charCodeAt(0))]);
            {codes["JavaScript"]}
            return predictions;
        }}""",
        base64.b64encode((tmp_path / "cat.jpg").read_bytes()).decode(),
    )
    assert given == best
    page.get_by_role("button", name="Copy Python").click()
    expect(page.locator("#announcer")).to_have_text("Copied.")
    assert page.evaluate("() => navigator.clipboard.readText()") == codes["Python"]


# --- The model ---


def test_the_page_names_the_model_and_lists_its_classes(page: Page) -> None:
    expect(page.locator(".lead")).to_contain_text("densenet121 names it, out of the 1,000 classes")
    page.get_by_text("The 1,000 classes that it knows").click()
    names = page.locator("#class-list li")
    expect(names).to_have_count(1000)
    rows = json.loads(Path("handler/index_to_name.json").read_text()).values()
    assert names.all_text_contents() == [in_words(name) for _, name in rows]
    page.get_by_label("Find a class").fill("Egyptian_C")
    expect(page.locator("#class-list li:visible")).to_have_text(["Egyptian cat"])
    expect(page.locator("#found")).to_have_text("1 found")


def test_the_page_works_at_the_servers_other_addresses_and_not_at_its_root(
    open_page: Open, running: Running
) -> None:
    origin = running.predictions_url.partition("/predictions")[0]
    for path in ("/invocations", "/explanations/densenet121"):
        page = open_page(origin + path)
        choose(page, CAT)
        expect_the_cats_answer(page, running)
        page.locator(".guess").first.click()
        expect(page.locator(".seen")).to_be_visible()
    # TorchServe's frontend answers this itself; the README says which address to open instead.
    root = requests.get(f"{origin}/", headers={"Accept": "text/html"}, timeout=TIMEOUT)
    assert root.status_code == 405


# --- Why ---


def test_each_guess_shows_where(page: Page, running: Running, console: Console) -> None:
    choose(page, CAT)
    expect(page.locator(".guess")).to_have_count(5)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    drawings = set()
    for row in ask(running)["predictions"]:
        guess = page.get_by_role("button", name=re.compile(f"^{in_words(row['label'])} \\d"))
        guess.click()
        expect(guess).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".guess[aria-pressed=true]")).to_have_count(1)
        explanation = explain(running, class_index=str(row["class_index"]))
        activation = np.array(explanation["map"])
        expect(page.locator(".why")).to_contain_text(
            meaning(in_words(row["label"]), activation.min(), activation.max())
        )
        expect(page.locator(".photo img")).to_have_css("filter", "grayscale(1)")
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
        relative = (activation - activation.min()) / (activation.max() - activation.min())
        # The middle of each of the 7x7 cells; that of 32 pixels lies between two.
        assert heat[16::32, 16::32] / 255 == pytest.approx(relative, abs=0.05)
    console.expect("willReadFrequently")  # the test's own reading of the canvas
    assert len(drawings) == 5
    assert len(asked) == 5
    page.locator(".guess").first.click()
    expect(page.locator(".guess").first).to_have_attribute("aria-pressed", "true")
    assert len(asked) == 5


def meaning(name: str, least: float, most: float) -> str:
    if most < 0:
        return f"All parts speak against \u201c{name}\u201d, the brighter ones less."
    against = "; clear ones speak against it" if least < 0 else ""
    return f"The brighter a part, the more it speaks for \u201c{name}\u201d{against}."


def drawn_heat(page: Page) -> np.ndarray:
    """The opacity of what the canvas shows: uint8 (224, 224)."""
    alpha = page.locator(".seen canvas").evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, 224, 224);
            return Array.from(data.filter((_, i) => i % 4 === 3));
        }"""
    )
    return np.array(alpha, np.uint8).reshape(224, 224)


def expect_no_map(page: Page) -> None:
    expect(page.locator(".seen")).not_to_be_visible()
    expect(page.locator(".legend")).not_to_be_visible()
    expect(page.locator(".guess[aria-pressed=true]")).to_have_count(0)
    expect(page.locator(".photo img")).to_have_css("filter", "none")


def test_a_second_click_takes_the_map_off(page: Page) -> None:
    choose(page, CAT)
    page.locator(".guess").first.click()
    expect(page.locator(".seen")).to_be_visible()
    expect(page.locator(".legend")).to_be_visible()
    page.locator(".guess").first.click()
    expect_no_map(page)


def test_a_map_goes_with_its_guess_and_stays_with_it(page: Page) -> None:
    choose(page, CAT)
    page.locator(".guess").nth(2).click()
    expect(page.locator(".seen")).to_be_visible()
    page.locator("#threshold").fill("0.9")
    page.get_by_label("Guesses shown").select_option("3")
    expect(page.locator(".seen")).to_be_visible()
    expect(page.locator(".guess").nth(2)).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Guesses shown").select_option("1")
    expect_no_map(page)


def test_a_map_that_comes_after_it_was_taken_off_stays_off(page: Page) -> None:
    choose(page, CAT)
    expect(page.locator(".guess")).to_have_count(5)
    page.route("**/explanations/**", lambda route: route.continue_())
    with page.expect_response("**/explanations/**"):
        page.locator(".guess").first.click()
        page.locator(".guess").first.click()
    page.wait_for_timeout(200)
    expect_no_map(page)


def test_the_overlay_can_be_faded(page: Page) -> None:
    choose(page, CAT)
    page.locator(".guess").first.click()
    canvas = page.locator(".seen canvas")
    expect(canvas).to_be_visible()
    page.get_by_label("Strength").fill("0.25")
    expect(canvas).to_have_css("opacity", "0.25")


# --- Files ---


def test_a_file_that_is_no_picture_is_answered_with_the_servers_words(
    page: Page, running: Running, console: Console
) -> None:
    choose(page, payload("notes.txt", NOTES, "text/plain"))
    expect(page.locator(".message")).to_have_text(ask(running, NOTES)["message"])
    expect(page.locator(".again")).not_to_be_visible()
    console.expect("status of 400")


def test_a_file_that_is_too_large_is_not_even_sent(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(MAX_REQUEST_BYTES))
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


def test_a_file_that_changed_after_it_was_chosen_is_told_as_such(
    page: Page, tmp_path: Path
) -> None:
    photo = tmp_path / "cat.png"
    photo.write_bytes(CAT_BYTES)
    choose(page, photo)
    expect(page.locator(".guess")).to_have_count(5)
    photo.write_bytes(CAT_BYTES + b"more")
    page.locator(".guess").first.click()
    expect(page.locator(".why")).to_contain_text("moved, changed or deleted after it was chosen")
    expect(page.locator(".guess[aria-pressed=true]")).to_have_count(0)


@pytest.fixture
def holidays(tmp_path: Path) -> Path:
    """A folder with pictures in two levels, and what else is in such folders."""
    folder = tmp_path / "holidays"
    (folder / "more").mkdir(parents=True)
    for name in ("10.png", "9.png", "more/11.PNG"):
        (folder / name).write_bytes(CAT_BYTES)
    for name in ("notes.txt", ".hidden.png"):
        (folder / name).write_bytes(NOTES)
    return folder


def drop_from_disk(page: Page, path: Path) -> None:
    """As from a file manager: what is dropped is really there, so that it can be walked."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})


def test_the_pictures_in_a_dropped_folder_are_taken(page: Page, holidays: Path) -> None:
    drop_from_disk(page, holidays)
    expect(answered(page)).to_have_count(3)
    names = page.locator(".file").all_text_contents()
    assert [name.split(",")[0] for name in names] == ["9.png", "10.png", "11.PNG"]
    expect(page.locator("#notice")).to_have_text("Took 3 pictures; left out 2 other files.")


def test_a_folder_without_pictures_is_told_as_such(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "notes.txt").write_bytes(NOTES)
    drop_from_disk(page, folder)
    expect(page.locator("#notice")).to_contain_text("There is no picture in this folder")
    expect(page.locator(".result")).to_have_count(0)
