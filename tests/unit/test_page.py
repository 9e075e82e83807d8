"""The page as the handler makes it; what it does is tested in a real browser."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from handler.errors import ArchiveError
from handler.page import PAGE, load_page
from handler.settings import ModelCard, Settings

CARD = ModelCard("densenet121", 1000, True, "w.pth", "a" * 64, "b" * 64)  # noqa: FBT003
UNTRAINED = ModelCard("densenet121", 1000, False, "w.pth", "a" * 64, "b" * 64)  # noqa: FBT003


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
    page = load_page(PAGE, UNTRAINED, Settings(topk=7, threshold=0.25))
    assert page.content_type == "text/html; charset=utf-8"
    assert settings_in(page.body) == {
        "topk": 7,
        "threshold": 0.25,
        "warning": UNTRAINED.warning,
        "explains": False,
    }
    trained = settings_in(load_page(PAGE, CARD, Settings()).body)
    assert trained["warning"] is None
    explains = replace(CARD, features="relu")
    assert settings_in(load_page(PAGE, explains, Settings()).body)["explains"] is True


def test_the_policy_lets_only_the_pages_own_script_and_style_run() -> None:
    page = load_page(PAGE, CARD, Settings())
    policy = dict(
        directive.split(" ", 1) for directive in page.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
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
        assert "src" not in attributes
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert tag == "link"
            assert str(attributes["href"]).startswith("data:")


def test_the_page_knows_how_large_a_request_may_be() -> None:
    (configured,) = re.findall(
        r"^max_request_size=(\d+)$", Path("config.properties").read_text(), re.MULTILINE
    )
    assert f"const MAX_REQUEST_BYTES = {configured};" in PAGE.read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("<p>", "needs <meta name=.settings")]
)
def test_a_wrong_page_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "page.html"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArchiveError, match=rf"page\.html: {message}"):
        load_page(path, CARD, Settings())
