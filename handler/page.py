"""The web page: one file, packed into the archive, that needs nothing from anywhere else.

Its Content-Security-Policy lets exactly the page's own script and style run, by their hashes, and
lets the script talk to nobody but the server that the page came from.
"""

import base64
import hashlib
import html
import json
import re
from http import HTTPStatus
from pathlib import Path

from handler.errors import ArchiveError
from handler.exchange import Response
from handler.settings import ModelCard, Settings

PAGE = Path(__file__).with_name("page.html")

# Where the page reads what the handler tells it.
_SETTINGS_PLACE = '<meta name="settings" content="{}">'


def load_page(path: Path, card: ModelCard, settings: Settings) -> Response:
    """The answer to a browser, made once.

    Args:
        path: `page.html`.
        card: says whether the page must warn.
        settings: where the page's controls stand at first, and the bounds that it can tell of.

    Raises:
        ArchiveError: the file is missing, or has no place for the settings.
    """
    try:
        page = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
    if page.count(_SETTINGS_PLACE) != 1:
        raise ArchiveError(f"{path.name}: needs {_SETTINGS_PLACE} once")
    told = {
        "topk": settings.topk,
        "threshold": settings.threshold,
        "warning": card.warning,
        "explains": bool(card.features),
    }
    filled = _SETTINGS_PLACE.replace("{}", html.escape(json.dumps(told)))
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # Whether it is the page or an answer depends on the Accept header.
        "Vary": "Accept",
    }
    body = page.replace(_SETTINGS_PLACE, filled).encode("utf-8")
    return Response(HTTPStatus.OK, body, "text/html; charset=utf-8", headers)


def _policy(page: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(page, 'script')}",
            f"style-src {_hashes(page, 'style')}",
            # The pictures that the user chose, from the browser's memory, and the page's own icon.
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # Text can then never become markup, whatever the script does.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hashes(page: str, element: str) -> str:
    contents = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digests = [hashlib.sha256(content.encode("utf-8")).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
