"""Make's variables: names of files come through whole, and errors speak of what was typed."""

import os
from pathlib import Path

import pytest

from classification_client.terminal import spelt
from scripts.sources import sources
from scripts.terminal import UserError

VARIABLES = ("IMAGE", "IMAGES")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(f"GIVEN_{name}", raising=False)
    for name in ("my cat.jpg", "it's.jpg", 'a "b" $(c).jpg', "x.jpg", "y.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "my holidays").mkdir()
    (tmp_path / "my holidays" / "z.jpg").touch()
    return tmp_path


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("my cat.jpg", ["my cat.jpg"]),
        ("it's.jpg", ["it's.jpg"]),
        ('a "b" $(c).jpg', ['a "b" $(c).jpg']),
        ("my holidays", ["my holidays"]),
        ("my holidays/*.jpg", ["my holidays/*.jpg"]),
        ("x.jpg y.jpg", ["x.jpg", "y.jpg"]),
        ("'my cat.jpg' *.jpg", ["my cat.jpg", "*.jpg"]),
        (r"my\ cat.jpg x.jpg", ["my cat.jpg", "x.jpg"]),
        ('"it\'s.jpg" x.jpg', ["it's.jpg", "x.jpg"]),
        ("-", ["-"]),
        ("missing.jpg", ["missing.jpg"]),
        ("  ", []),
    ],
)
@pytest.mark.usefixtures("place")
def test_one_rule_for_both(
    variable: str, value: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"GIVEN_{variable}", value)
    assert sources(*VARIABLES) == expected


@pytest.mark.usefixtures("place")
def test_the_users_own_folder_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN_IMAGES", "~/pictures x.jpg")
    assert sources(*VARIABLES) == [os.path.expanduser("~/pictures"), "x.jpg"]  # noqa: PTH111


@pytest.mark.usefixtures("place")
def test_a_quote_without_an_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN_IMAGES", "it's.jpg x.jpg")
    with pytest.raises(UserError, match=r"IMAGES=it's\.jpg x\.jpg: .* a quote without an end"):
        sources(*VARIABLES)


def test_options_are_spelt_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIVEN_TO", raising=False)
    assert [spelt("topk", 3), spelt("output")] == ["--topk 3", "--output"]
    monkeypatch.setenv("GIVEN_TO", "make classify")
    assert [spelt("topk", 3), spelt("output")] == ["TOPK=3", "OUTPUT"]
