"""Read the file of API keys: one line per client with its name and its key."""

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from scripts.terminal import UserError

_KEY_LINE = re.compile(r"(?P<name>[\w.-]{1,64})\s+(?P<key>[A-Za-z0-9_-]{16,128})", re.ASCII)


@dataclass(frozen=True)
class Key:
    """A client's name, for the log and HTTP basic authentication, and its secret key."""

    name: str
    key: str

    @property
    def basic(self) -> str:
        """Return the credentials of HTTP basic authentication (RFC 7617)."""
        return base64.b64encode(f"{self.name}:{self.key}".encode()).decode()


def read_keys(path: Path) -> list[Key]:
    """Return clients' names and keys; lines that begin with `#` are comments.

    Raises:
        UserError: the file cannot be read, a line is malformed, two lines have the same name or
            key, or other users can read the file.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        status = path.stat()
        # Kubernetes mounts a Secret as a file of root that the container's group can read.
        mounted = status.st_uid == 0 != os.geteuid()
        if status.st_mode & (0o007 if mounted else 0o077):
            raise UserError(f"{path} can be read by others. Run: chmod 600 {quote(str(path))}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"The keys {path} cannot be read: {reason}.") from error
    keys: list[Key] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _KEY_LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"{path}, line {number}: expected a client's name and a key of 16 to 128 letters, "
                "digits, - and _. Make a key with: openssl rand -hex 24"
            )
        key = Key(match["name"], match["key"])
        if any(key.name == other.name or key.key == other.key for other in keys):
            raise UserError(f"{path}, line {number}: another line has this name or this key.")
        keys.append(key)
    if not keys:
        raise UserError(f"{path} holds no key.")
    return keys
