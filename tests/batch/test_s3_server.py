"""That the tests' S3 server is one: what it keeps, what it refuses, and what pyarrow says then."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyarrow import fs

from tests.batch.s3_server import ACCESS_KEY, BUCKET, S3, s3_server

# Two parts of a multipart upload, and some.
LARGE = bytes(range(256)) * (12 << 12)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def _write(files: Any, path: str, content: bytes) -> None:
    with files.open_output_stream(path) as stream:
        stream.write(content)


def _read(files: Any, path: str) -> bytes:
    with files.open_input_file(path) as stream:
        content: bytes = stream.read()
    return content


def test_it_keeps_lists_overwrites_and_deletes(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    files = s3.filesystem()
    large, odd = f"{BUCKET}/a/large", f"{BUCKET}/a/ä b%20+&.jpg"
    _write(files, large, LARGE)
    _write(files, odd, b"first")
    _write(files, odd, b"second")
    found = files.get_file_info(fs.FileSelector(f"{BUCKET}/a", recursive=True))
    assert {i.path: i.size for i in found} == {large: len(LARGE), odd: len(b"second")}
    assert _read(files, large) == LARGE
    with files.open_input_file(large) as stream:
        assert stream.read_at(300, 9_000_000) == LARGE[9_000_000:9_000_300]
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    by_address, path = fs.FileSystem.from_uri(s3.address(f"{BUCKET}/a/large"))
    assert by_address.get_file_info(path).size == len(LARGE)
    files.delete_file(odd)
    with pytest.raises(FileNotFoundError, match="Path does not exist"):
        _read(files, odd)


@pytest.mark.parametrize(
    ("key", "secret"), [(ACCESS_KEY, "wrong"), ("test:nobody", "testing")], ids=["secret", "key"]
)
def test_wrong_credentials_are_refused(s3: S3, key: str, secret: str) -> None:
    _write(s3.filesystem(), f"{BUCKET}/mine", b"mine")
    stranger = s3.filesystem(key, secret)
    attempts: dict[str, Callable[[], object]] = {
        "ACCESS_DENIED": lambda: _read(stranger, f"{BUCKET}/mine"),
        "SIGNATURE_DOES_NOT_MATCH": lambda: stranger.get_file_info(fs.FileSelector(BUCKET)),
        "AWS Error": lambda: _write(stranger, f"{BUCKET}/mine", b"theirs"),
    }
    for said, attempt in attempts.items():
        with pytest.raises(OSError, match=said):
            attempt()
    assert _read(s3.filesystem(), f"{BUCKET}/mine") == b"mine"


def test_a_missing_bucket_is_named(s3: S3) -> None:
    files = s3.filesystem()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        files.get_file_info(fs.FileSelector("nobody"))
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        _write(files, "nobody/part", b"part")
