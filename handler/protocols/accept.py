"""Content negotiation with the `Accept` header (RFC 9110, 12.5.1)."""

import re
from collections.abc import Mapping

from handler.request import Request


def prefers(request: Request, media_type: str, other: str) -> bool:
    """Return whether the `Accept` header prefers `media_type` to `other`.

    With equal weights, a media type is preferred only if the header names it without a wildcard.
    """
    weights = _accepted(request.header("accept"))
    weight, others = _weight(weights, media_type), _weight(weights, other)
    return weight > others or (weight == others > 0 and media_type in weights)


def _accepted(header: str) -> dict[str, float]:
    """Return the weight, 0 to 1, of each media type or range."""
    weights = {}
    for entry in header.lower().split(","):
        media_type, *parameters = (part.strip() for part in entry.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        is_weight = re.fullmatch(r"[01](\.[0-9]{0,9})?", weight)
        weights[media_type] = min(1.0, float(weight)) if is_weight else 1.0
    return weights


def _weight(weights: Mapping[str, float], media_type: str) -> float:
    ranges = (media_type, media_type.partition("/")[0] + "/*", "*/*")
    return next((weights[found] for found in ranges if found in weights), 0.0)
