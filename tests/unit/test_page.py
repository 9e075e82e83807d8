"""The page as the handler makes it; what it does is tested in a real browser."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from classification_client.images import SUFFIXES
from handler.archive import Archive
from handler.errors import ArchiveError
from handler.inference.explain import HEAT_COLORS
from handler.labels import CLASS_INDEX, Label, load_class_index
from handler.page import PAGE, load_page
from handler.request import Response
from handler.settings import MAX_REQUEST_BYTES, ModelCard, Settings

CARD = ModelCard("densenet121", 1000, True, "w.pth", "a" * 64, "b" * 64)
UNTRAINED = replace(CARD, trained=False)
LABELS = [Label("n1", "tench"), Label("n2", 'it\'s <b>"bold"</b> &amp; \u732b')]


def load(
    card: ModelCard = CARD,
    settings: Settings | None = None,
    labels: Sequence[Label] = LABELS,
    path: Path = PAGE,
) -> Response:
    archive = Archive(
        Path("model.onnx"), card, labels, settings or Settings(), "densenet121", "1.0"
    )
    return load_page(path, archive)


class Elements(HTMLParser):
    """All elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def settings_in(page: bytes) -> dict[str, object]:
    (content,) = [
        attributes["content"]
        for tag, attributes in Elements(page.decode()).found
        if tag == "meta" and attributes.get("name") == "settings"
    ]
    assert content is not None
    told: dict[str, object] = json.loads(content)
    return told


def test_the_page_knows_the_servers_settings() -> None:
    page = load(UNTRAINED, Settings(topk=7, threshold=0.25))
    assert page.content_type == "text/html; charset=utf-8"
    assert settings_in(page.body) == {
        "topk": 7,
        "threshold": 0.25,
        "warning": UNTRAINED.warning,
        "explains": False,
        "model": "densenet121",
        "architecture": "densenet121",
        "trained_model": "",
        "multilabel": False,
        "preprocessing": {"fit": "crop", "resize": 255, "crop": 224},
        "max_bytes": MAX_REQUEST_BYTES,
        "classes": 2,
        "names": [label.class_name for label in LABELS],
    }
    assert settings_in(load(CARD).body)["warning"] is None
    assert settings_in(load(replace(CARD, features="relu")).body)["explains"] is True


def test_a_page_with_very_many_classes_only_counts_them() -> None:
    """With their names it could be larger than an answer may be, which would end the worker."""
    page = load(labels=[Label(f"n{i}", f"class_{i}") for i in range(100_000)])
    told = settings_in(page.body)
    assert (told["classes"], told["names"]) == (100_000, None)
    assert len(page.body) < 200_000


def test_the_page_is_light_enough_for_a_phones_network() -> None:
    assert len(load(labels=load_class_index(PAGE.with_name(CLASS_INDEX), 1000)).body) < 150_000


def test_each_sample_is_a_picture_that_the_handler_accepts() -> None:
    samples = [
        str(attributes["src"])
        for tag, attributes in Elements(PAGE.read_text("utf-8")).found
        if tag == "img" and attributes.get("src")
    ]
    assert len(samples) == 3
    for sample in samples:
        content = base64.b64decode(sample.removeprefix("data:image/webp;base64,"), validate=True)
        assert len(content) < 25_000
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert (picture.format, picture.size) == ("WEBP", (384, 288))


def test_the_policy_lets_only_the_pages_own_script_and_style_run() -> None:
    page = load()
    policy = dict(
        directive.split(" ", 1) for directive in page.headers["Content-Security-Policy"].split("; ")
    )
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[name] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element in ("script", "style"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert all(value.isascii() for value in page.headers.values())


def test_the_page_loads_nothing() -> None:
    for tag, attributes in Elements(PAGE.read_text("utf-8")).found:
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert tag == "link"
            assert str(attributes["href"]).startswith("data:")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("<p>", "needs <meta name=.settings")]
)
def test_a_wrong_page_is_rejected(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "page.html"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArchiveError, match=rf"page\.html: {message}"):
        load(path=path)


def test_the_page_has_the_servers_colors_and_the_clients_file_names() -> None:
    page = PAGE.read_text("utf-8")
    (colours,) = re.findall(r"const HEAT_COLORS = (.*);", page)
    assert json.loads(colours) == [list(colour) for colour in HEAT_COLORS]
    (names,) = re.findall(r"IMAGE_NAMES = /(.*)/i;", page)
    assert all(re.search(names, f"x{suffix}") for suffix in SUFFIXES)
    assert re.search(names, "x.pdf") is None
