"""Serve the web UI: one HTML file in the archive, without external resources.

Its Content-Security-Policy allows only its own script and style, by their hashes, and connections
to the server that it came from.
"""

import base64
import hashlib
import html
import json
import re
from http import HTTPStatus
from pathlib import Path

from handler.archive import Archive
from handler.errors import ArchiveError
from handler.request import Response
from handler.settings import MAX_REQUEST_BYTES

PAGE = Path(__file__).with_name("page.html")

# The element from which the web UI reads its settings. The single quotes save 10 kB of escaped
# double quotes in the JSON of 1,000 classes.
_SETTINGS_PLACE = "<meta name=\"settings\" content='{}'>"

# Maximum total length of the class names that the web UI lists, in characters; ImageNet's 1,000
# names have 15,000. A million names would exceed the maximum response size.
_MAX_CLASS_LIST = 250_000


def load_page(path: Path, archive: Archive) -> Response:
    """Return the response with the web UI, the same for all browsers.

    Raises:
        ArchiveError: the file is missing, or lacks the element for the settings.
    """
    try:
        page = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
    if page.count(_SETTINGS_PLACE) != 1:
        raise ArchiveError(f"{path.name}: needs {_SETTINGS_PLACE} once")
    card, settings, shape = archive.card, archive.settings, archive.card.preprocessing
    names = [label.class_name for label in archive.labels]
    thresholds = set(card.thresholds if card.multilabel else [settings.threshold])
    values = {
        "model": archive.name,
        "architecture": card.architecture,
        "classes": len(names),
        "names": names if sum(map(len, names)) <= _MAX_CLASS_LIST else None,
        "topk": settings.topk,
        "threshold": thresholds.pop() if len(thresholds) == 1 else None,  # else they differ
        "warning": card.warning,
        "trained_model": card.trained_model,
        "explains": bool(card.features),
        "multilabel": card.multilabel,
        "preprocessing": {"fit": shape.fit, "resize": shape.resize, "crop": shape.crop},
        "max_bytes": MAX_REQUEST_BYTES,
    }
    escaped = html.escape(json.dumps(values), quote=False).replace("'", "&#39;")
    filled = _SETTINGS_PLACE.replace("{}", escaped)
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # The Accept header selects the web UI or JSON.
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
            # blob: for the user's images, data: for the icon and the sample images.
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # The script cannot turn text into markup.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hashes(page: str, element: str) -> str:
    contents = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digests = [hashlib.sha256(content.encode("utf-8")).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
