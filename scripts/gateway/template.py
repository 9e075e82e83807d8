"""Render `nginx.conf.jinja`, the configuration of nginx in the gateway and the container image.

This module imports only Jinja, YAML and the handler's settings, to keep the container image small.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from handler.settings import MAX_REQUEST_BYTES
from scripts.gateway.openapi import content_security_policy

# The protocol with its own path, `/huggingface/MODEL`; see handler/protocols/huggingface.py.
HUGGING_FACE = "huggingface"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # not HTML, and all values are validated
)


@dataclass(frozen=True)
class Route:
    """One path of the service.

    Attributes:
        path: the path that clients request.
        target: path on TorchServe; by default the same path.
        methods: allowed methods; all others get 405.
        protocol: for the handler, if the body does not identify it.
        answer: constant response instead of TorchServe's.
        needs_ready: whether the constant response is `unready` with 503 while no worker is ready.
    """

    path: str
    target: str = ""
    methods: tuple[str, ...] = ("GET", "HEAD")
    protocol: str = ""
    answer: str | None = None
    needs_ready: bool = False
    unready: str = ""


def render_template(**values: Any) -> str:
    """Render nginx.conf; variables of only the gateway or only the container image are optional."""
    absent: dict[str, Any] = {
        "as_root": os.geteuid() == 0,
        "foreground": True,
        "proxies": [],
        "keys": [],
        "limits": None,
        "resolver": "",
        "tls": None,
        "redirect_port": 0,
        "prefix": "",
        "acme": None,
        "model": "",
        "ready_file": None,
        "error_alias": "",
        "max_request_bytes": MAX_REQUEST_BYTES,
        "docs_policy": content_security_policy(),
    }
    return _ENVIRONMENT.get_template("nginx.conf.jinja").render(absent | values)


def has_ipv6() -> bool:
    """Return whether this machine can listen on IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
