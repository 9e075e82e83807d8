"""Bytes to a server and back, as no well-behaved client sends them."""

import socket
import time
from collections.abc import Sequence

_TIMEOUT = 20.0


def exchange(port: int, *pieces: bytes, quiet: float = 1.5, patience: float = _TIMEOUT) -> bytes:
    """Sends pieces over one connection; returns all that comes until it is quiet or closed.

    Args:
        port: on loopback.
        pieces: sent one after the other.
        quiet: seconds without a byte, after the first, that end it.
        patience: seconds to wait for the first.
    """
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.02)
            while chunk := connection.recv(1 << 16):
                received += chunk
                connection.settimeout(quiet)
        except (TimeoutError, ConnectionError):
            pass
    return received


def request(
    line: str, body: bytes = b"", *, headers: Sequence[str] = (), length: bool = True
) -> bytes:
    """A request; `length` says whether it carries its Content-Length."""
    head = [f"{line} HTTP/1.1", "Host: localhost", *headers]
    if length:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def statuses(received: bytes) -> list[int]:
    """The status of each answer in what was received."""
    parts = received.split(b"HTTP/1.1 ")[1:]
    return [int(part[:3]) for part in parts]
