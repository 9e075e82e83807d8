"""Which errors of an image's file are permanent, and which are transient."""

import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from classification_client.reading import PassingError, check_unchanged, in_thread, judged, read

MOST = 1000


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"picture")
    return file


@pytest.mark.parametrize(
    ("transient", "numbers"),
    [
        (True, "EIO ESTALE ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH EMFILE ENFILE ENOMEM EAGAIN"),
        (True, "ENODEV EREMOTEIO EKEYEXPIRED"),
        (False, "ENOENT EACCES EPERM EISDIR ENAMETOOLONG"),
    ],
)
def test_what_a_drive_says_is_transient_and_what_one_file_says_is_not(
    transient: bool,  # noqa: FBT001
    numbers: str,
    picture: Path,
) -> None:
    for name in numbers.split():
        error = OSError(getattr(errno, name), "")
        assert isinstance(judged(error, picture), PassingError) == transient, name


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_file_whose_folder_is_away_may_come_back(number: int, picture: Path) -> None:
    error = OSError(number, os.strerror(number))
    away = picture.parent / "share"
    away.mkdir()  # a drive that is not mounted leaves an empty folder
    assert isinstance(judged(error, away / "a.jpg"), PassingError)
    away.rmdir()
    told = judged(error, away / "a.jpg")
    assert isinstance(told, PassingError)
    assert told.strerror == f"its folder {away} is not there"
    link = picture.parent / "link.jpg"
    link.symlink_to(away / "a.jpg")
    assert isinstance(judged(error, link), PassingError)


def test_a_real_failure_of_input_may_pass(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.symlink_to("/proc/self/mem")  # opens, and cannot be read at its beginning
    with pytest.raises(PassingError, match="Input/output error"):
        read(bad, MOST)


def test_too_many_open_files_may_pass(picture: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(PassingError, match="Too many open files"):
            read(picture, MOST)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read(picture, MOST).content == b"picture"


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name in ("pipe.jpg", "endless.jpg", "loop.jpg", "", "missing.jpg", "no\0name", "a" * 999):
        with pytest.raises(OSError, match=r"\[Errno \d+\]") as refused:
            read(tmp_path / name, MOST)
        assert not isinstance(refused.value, PassingError), name


def test_no_more_is_read_than_is_wanted(picture: Path) -> None:
    assert read(picture, 7).content == b"picture"
    assert (read(picture, 6).content, read(picture, 6).size) == (None, 7)


def test_a_file_that_is_written_to_meanwhile_is_read_again(picture: Path) -> None:
    half = read(picture, MOST)
    check_unchanged(picture, half)
    with picture.open("ab") as file:
        file.write(b", the rest of it")
    with pytest.raises(PassingError, match="another program is writing to it"):
        check_unchanged(picture, half)


def test_a_drive_that_hangs_does_not_keep_the_program() -> None:
    assert in_thread(lambda: 7, 5) == 7
    with pytest.raises(KeyError):
        in_thread(lambda: os.environb[b"no such variable"], 5)
    never = threading.Event()
    with pytest.raises(PassingError, match="the drive does not answer"):
        in_thread(never.wait, 0.1)
    never.set()
