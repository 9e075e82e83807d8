"""What a command line means, and that nothing is left out without a word."""

import os
from pathlib import Path

import pytest

from classification_client.pictures import find_pictures
from scripts.terminal import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "my holidays"
    for name in ("b.jpg", "a.JPG", "sub/c.webp", "notes.txt", "film.mov", "more.txt", "README"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    return place


def names(folder: Path, *sources: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_pictures(sources).pictures]


def test_what_is_left_out_of_a_folder_is_counted(folder: Path) -> None:
    (folder / ".thumbnail.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to("nothing")
    os.mkfifo(folder / "pipe.jpg")
    found = find_pictures([str(folder)])
    assert [path.name for path in found.pictures] == ["a.JPG", "b.jpg", "c.webp"]
    assert found.left_out == (
        "Left out of the folders: 4 not called as pictures (2 .txt, 1 .mov, 1 without a suffix), "
        "2 link(s) to nothing, pipes or devices, 1 hidden."
    )
    assert find_pictures([str(folder / "b.jpg")]).left_out is None


def test_folders_that_lead_back_are_searched_once(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "self").symlink_to("self")
    assert names(folder, str(folder)) == ["a.JPG", "b.jpg", "sub/c.webp"]
    assert "1 link(s) to folders" in (find_pictures([str(folder)]).left_out or "")


def test_a_pattern_reaches_into_folders_and_takes_whatever_it_matches(folder: Path) -> None:
    assert names(folder, f"{folder}/**/[b-n]*") == [
        "b.jpg",
        "film.mov",
        "more.txt",
        "notes.txt",
        "sub/c.webp",
    ]


def test_a_folder_of_other_files_says_what_is_there(folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no picture here\. Left out of the folders: 1 not called"):
        find_pictures([str(folder / "texts")])


def test_a_folder_that_is_closed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(folder / "sub", PermissionError(13, "Permission denied"), monkeypatch)
    found = find_pictures([str(folder)])
    assert found.closed == {folder / "sub": "Permission denied"}


def test_a_folder_that_cannot_be_read_now_stops_the_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(folder / "sub", OSError(5, "Input/output error"), monkeypatch)
    with pytest.raises(UserError, match="sub cannot be read now: Input/output error"):
        find_pictures([str(folder)])


def fail_on(folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom nothing is denied."""
    scandir = os.scandir

    def failing(path: Path) -> object:
        if Path(path) == folder:
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a.jpg\r\nb c.jpg\r\n", ["a.jpg", "b c.jpg"]),
        (b"\xef\xbb\xbfa.jpg\n", ["a.jpg"]),
        ("a.jpg\r\n\u00e9.jpg\r\n".encode("utf-16"), ["a.jpg", "\u00e9.jpg"]),
        (b"two\nlines.jpg\0a.jpg\0", ["two\nlines.jpg", "a.jpg"]),
        (b"\xff.jpg\n", [os.fsdecode(b"\xff.jpg")]),
    ],
)
def test_lists_are_read_as_programs_write_them(
    content: bytes, expected: list[str], tmp_path: Path
) -> None:
    listing = tmp_path / "list"
    listing.write_bytes(content)
    assert list(map(str, find_pictures([], str(listing)).pictures)) == expected


@pytest.mark.parametrize("source", ["nowhere.jpg", "a" * 999, "no*where"])
def test_what_is_not_there_is_told(source: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read|there is no such file"):
        find_pictures([source])
