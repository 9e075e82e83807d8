"""Which images a command line means, and that nothing is skipped silently."""

import os
from pathlib import Path

import pytest

from classification_client.errors import UserError
from classification_client.images import find_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "my holidays"
    for name in ("b.jpg", "a.JPG", "sub/c.webp", "notes.txt", "film.mov", "more.txt", "README"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    return place


def names(folder: Path, *sources: str) -> list[str]:
    found = find_images(sources).images
    return [str(path.relative_to(folder)) for path in found if isinstance(path, Path)]


def test_what_is_skipped_in_a_folder_is_counted(folder: Path) -> None:
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "a.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to("nothing")
    (folder / "sub" / "up").symlink_to(folder)  # leads back
    os.mkfifo(folder / "pipe.jpg")
    assert names(folder, str(folder)) == ["a.JPG", "b.jpg", "sub/c.webp"]
    assert find_images([str(folder)]).left_out == (
        "Skipped in the folders: 1 .mov, 2 .txt, 1 hidden, 2 not regular, 2 without a suffix."
    )
    assert find_images([str(folder / "b.jpg")]).left_out is None


def test_a_pattern_reaches_into_folders_and_takes_whatever_it_matches(folder: Path) -> None:
    expected = ["b.jpg", "film.mov", "more.txt", "notes.txt", "sub/c.webp"]
    assert names(folder, f"{folder}/**/[b-n]*") == expected


def test_a_folder_that_cannot_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def failing(path: str) -> object:  # tests may run as root, whom nothing is denied
        if path == str(folder / "sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert find_images([str(folder)]).closed == {folder / "sub": "Permission denied"}
    with pytest.raises(UserError, match=r"no image here.*sub cannot be read: Permission denied"):
        find_images([str(folder / "sub")])


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
    assert list(map(str, find_images([], str(listing)).images)) == expected


@pytest.mark.parametrize("source", ["nowhere.jpg", "a" * 999, "no*where"])
def test_a_missing_file_is_an_error(source: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read|there is no such file"):
        find_images([source])
