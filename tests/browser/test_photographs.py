"""Photographs with known content, in the web UI of a model with trained weights."""

from collections.abc import Callable

from playwright.sync_api import Page, expect

from benchmarks.known import CAT_LABELS, KNOWN
from scripts.serve.running import Running
from tests.browser.person import answered, choose, in_words

Open = Callable[..., Page]


def test_every_photograph_is_recognized_and_nothing_warns(
    open_page: Open, lite0_server: Running
) -> None:
    page = open_page(lite0_server.predictions_url)
    expect(page.locator("#warning")).not_to_be_visible()
    choose(page, *(known.path for known in KNOWN))
    expect(answered(page)).to_have_count(len(KNOWN))
    for known in KNOWN:
        row = page.locator(".result").filter(has_text=known.path.name)
        label = row.locator(".toggle").inner_text()
        assert label in {in_words(name) for name in known.labels}, known.path.name
    expect(page.locator(".caution:visible")).to_have_count(0)


def test_the_sample_cat_is_a_cat(open_page: Open, lite0_server: Running) -> None:
    page = open_page(lite0_server.predictions_url)
    page.get_by_role("button", name="cat").click()
    expect(answered(page)).to_have_count(1)
    assert page.locator(".guess .name").first.inner_text() in map(in_words, CAT_LABELS)
