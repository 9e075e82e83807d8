"""The largest request stands in `handler.settings`; what cannot import that says the same."""

import re
from pathlib import Path

import pytest

from classification_client.client import MAX_PICTURE_BYTES
from handler.page import PAGE
from handler.settings import MAX_REQUEST_BYTES

# What the lines and headers of a form around one picture take at most.
FORM_BYTES = 4096


@pytest.mark.parametrize("path", ["config.properties", "deploy/container/config.properties"])
def test_torchserve_is_configured_for_it(path: str) -> None:
    found = re.findall(r"^max_request_size=(\d+)$", Path(path).read_text(), re.MULTILINE)
    assert found == [str(MAX_REQUEST_BYTES)]


def test_the_page_knows_it() -> None:
    page = PAGE.read_text("utf-8")
    assert f"const MAX_REQUEST_BYTES = {MAX_REQUEST_BYTES};" in page
    assert f"const FORM_BYTES = {FORM_BYTES};" in page
    assert set(re.findall(r"\b\d+ MB\b", page)) == {f"{MAX_REQUEST_BYTES // 1024**2} MB"}


def test_the_client_knows_it() -> None:
    assert MAX_PICTURE_BYTES == MAX_REQUEST_BYTES - FORM_BYTES
