"""A real S3-speaking server on loopback: OpenStack Swift's S3 API, see `swift_server.py`.

with s3_server(tmp_path) as s3:
files = s3.filesystem()
address = s3.address("pictures/cats")
subprocess.run(..., env=os.environ | s3.environment)
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from benchmarks.faults import wait_for

HERE = Path(__file__).parent
BUCKET = "pictures"
# As in swift_server.py.
ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
REGION = "us-east-1"
# Seconds.
_END = 10.0


@dataclass(frozen=True)
class S3:
    """A server that runs, with the empty bucket `BUCKET`.

    Attributes:
        endpoint: HOST:PORT.
    """

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which S3's clients know who they are."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            # Without it they look for credentials at the address of a cloud's machine.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def address(self, path: str = BUCKET) -> str:
        """`bucket/key` as one text, without credentials."""
        options = f"endpoint_override={self.endpoint}&scheme=http&region={REGION}"
        return f"s3://{path}?{options}"

    def filesystem(self, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Any:
        """Pyarrow's file system of it."""
        return fs.S3FileSystem(
            access_key=access_key,
            secret_key=secret_key,
            endpoint_override=self.endpoint,
            scheme="http",
            region=REGION,
            allow_bucket_creation=True,
        )


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """A server with its packages and its data in this folder; it ends with the block."""
    if sys.platform != "linux":
        pytest.skip("NOT RUN: Swift runs on Linux only")
    python = _environment(folder / "swift-packages")
    data, port_file, log = folder / "swift", folder / "swift.port", folder / "swift.log"
    data.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, HERE / "swift_server.py", data, port_file],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: port_file.exists() or process.poll() is not None)
        assert port_file.exists(), log.read_text()
        server = S3(f"127.0.0.1:{port_file.read_text()}")
        server.filesystem().create_dir(BUCKET)
        yield server
        assert process.poll() is None, f"Swift ended during the tests:\n{log.read_text()}"
    finally:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(folder: Path) -> Path:
    """The Python of a new environment with Swift."""
    uv, python = Path(sys.executable).with_name("uv"), folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    lock = HERE / "requirements.lock"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", lock],
        check=True,
    )
    return python
