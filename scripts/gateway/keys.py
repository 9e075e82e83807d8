"""Clients' keys, and what a browser gets in place of one when a person signs in with it.

A session is no record on the server: it is a code made of the key, the half day in which it was
handed out, and a secret of the gateway's. nginx is told the codes that count now, so that a session
ends when its key leaves the file, when the gateway starts anew, and after a day at the latest.
"""

import hashlib
import hmac
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.terminal import UserError

# A browser keeps its session for so long; nginx takes it for up to twice that.
SESSION_SECONDS = 12 * 60 * 60

_KEY_LINE = re.compile(r"(?P<name>[\w.-]{1,64})\s+(?P<key>[A-Za-z0-9_-]{16,128})", re.ASCII)


@dataclass(frozen=True)
class Key:
    """Who may ask: a name for the log, and the secret that proves it."""

    name: str
    key: str

    def sessions(self, secret: str, now: float | None = None) -> tuple[str, str]:
        """The sessions that stand for this key, 64 hexadecimal digits each; the newer one first.

        Args:
            secret: the gateway's own.
            now: seconds since 1970, in place of the clock's.
        """
        half_day = int((time.time() if now is None else now) // SESSION_SECONDS)
        newer, older = (
            hmac.new(secret.encode(), f"{number}/{self.key}".encode(), hashlib.sha256).hexdigest()
            for number in (half_day, half_day - 1)
        )
        return newer, older


def read_keys(path: Path) -> list[Key]:
    """Clients' names and keys; lines that begin with `#` are comments.

    Raises:
        UserError: the file cannot be read, a line is malformed, two lines are one client's or have
            one key, or others may read the file.
    """
    try:
        lines = path.read_text().splitlines()
        status = path.stat()
        # Where root has given the file to this program, as Kubernetes does with a Secret, it is the
        # group that may read it.
        given = status.st_uid == 0 != os.geteuid()
        if status.st_mode & (0o007 if given else 0o077):
            raise UserError(f"{path} can be read by others. Run: chmod 600 {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"The keys {path} cannot be read: {reason}.") from error
    clients: list[Key] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _KEY_LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"{path}, line {number}: expected a client's name and a key of 16 to 128 letters, "
                "digits, - and _. Make a key with: openssl rand -hex 24"
            )
        client = Key(match["name"], match["key"])
        if any(client.name == other.name or client.key == other.key for other in clients):
            raise UserError(f"{path}, line {number}: this name or this key was given to another.")
        clients.append(client)
    if not clients:
        raise UserError(f"{path} holds no key.")
    return clients
