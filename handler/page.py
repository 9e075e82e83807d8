"""The web page: one file, packed into the archive, that needs nothing from anywhere else.

Its Content-Security-Policy lets exactly the page's own script and style run, by their hashes, and
lets the script talk to nobody but the server that the page came from.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from handler.errors import ArchiveError
from handler.exchange import Response
from handler.labels import Label
from handler.settings import ModelCard, Settings

PAGE = Path(__file__).with_name("page.html")

# Where the page reads what the handler tells it. JSON is full of double quotes, so that single ones
# around it save 10 kB of escapes for 1,000 classes.
_SETTINGS_PLACE = "<meta name=\"settings\" content='{}'>"

# Names of classes that the page lists: 1,000 have 15,000 characters. A page with a million of them
# would be larger than an answer may be.
_LONGEST_CLASS_LIST = 250_000


def load_page(
    path: Path, card: ModelCard, settings: Settings, labels: Sequence[Label], model: str
) -> Response:
    """The answer to a browser, made once.

    Args:
        path: `page.html`.
        card: says whether the page must warn.
        settings: where the page's controls stand at first.
        labels: the classes, which the page lists unless there are too many.
        model: the name under which TorchServe serves the model.

    Raises:
        ArchiveError: the file is missing, or has no place for the settings.
    """
    try:
        page = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
    if page.count(_SETTINGS_PLACE) != 1:
        raise ArchiveError(f"{path.name}: needs {_SETTINGS_PLACE} once")
    names = [label.class_name for label in labels]
    told = {
        "model": model,
        "classes": len(names),
        "names": names if sum(map(len, names)) <= _LONGEST_CLASS_LIST else None,
        "topk": settings.topk,
        "threshold": _one_threshold(card) if card.multilabel else settings.threshold,
        "warning": card.warning,
        "explains": bool(card.features),
    }
    if card.multilabel:
        told["multilabel"] = True
    escaped = html.escape(json.dumps(told), quote=False).replace("'", "&#39;")
    filled = _SETTINGS_PLACE.replace("{}", escaped)
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # Whether it is the page or an answer depends on the Accept header.
        "Vary": "Accept",
    }
    body = page.replace(_SETTINGS_PLACE, filled).encode("utf-8")
    return Response(HTTPStatus.OK, body, "text/html; charset=utf-8", headers)


def _one_threshold(card: ModelCard) -> float | None:
    """What all classes have; None where they differ."""
    found = set(card.thresholds)
    return found.pop() if len(found) == 1 else None


def _policy(page: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(page, 'script')}",
            f"style-src {_hashes(page, 'style')}",
            # The pictures that the user chose, from the browser's memory, and the page's own icon
            # and samples.
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
