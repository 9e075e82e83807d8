"""Which errors of an image's file are permanent, and which are transient."""

import errno
import os
from pathlib import Path

import pytest

from classification_client import TransientError
from classification_client.reading import check_unchanged, read

LIMIT = 1000


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    assert read(tmp_path / "a.jpg", LIMIT)[0] == b"image"
    content, status = read(tmp_path / "a.jpg", 2)
    assert (content, status.st_size) == (b"ima", 5)


def test_an_input_error_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(TransientError, match="Stale file handle"):
        read(tmp_path / "a.jpg", LIMIT)


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_missing_or_empty_folder_is_a_transient_error(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()  # as a drive that is not mounted leaves it
    (tmp_path / "link.jpg").symlink_to(tmp_path / folder / "a.jpg")
    for file in (tmp_path / folder / "a.jpg", tmp_path / "link.jpg"):
        with pytest.raises(TransientError, match="its folder is missing or empty"):
            read(file, LIMIT)


def test_a_path_that_is_not_a_regular_file_is_a_permanent_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name in ("pipe.jpg", "endless.jpg", "loop.jpg", "", "missing.jpg", "no\0name", "a" * 999):
        with pytest.raises(OSError, match=r"\[Errno \d+\]") as error:
            read(tmp_path / name, LIMIT)
        assert not isinstance(error.value, TransientError), name


def test_a_file_that_was_written_to_meanwhile_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"half")
    _, half = read(file, LIMIT)
    check_unchanged(file, half)
    with file.open("ab") as opened:
        opened.write(b", the rest of it")
    with pytest.raises(TransientError, match="another program is writing to it"):
        check_unchanged(file, half)
