"""Reads a request's JSON within bounds of work and memory.

A byte of JSON can take thirty of memory: each empty list or object is one of its own. A picture in
base64 needs none of that, so a body of more parts than any request has is refused unread.
"""

import json
from typing import Any

from handler.errors import BadRequest

# Lists, objects, and their members. 16 images with names and options have some hundreds; images as
# lists of numbers would have more, and are not accepted anyway.
_MOST_PARTS = 100_000
_PARTS = "[{,"


def read_json(body: bytes | bytearray | str) -> Any:
    """Parses a body.

    Args:
        body: UTF-8, 16 or 32, as JSON may be.

    Raises:
        BadRequest: it has too many parts.
        ValueError: it is not JSON.
    """
    text = body if isinstance(body, str) else body.decode(json.detect_encoding(body))
    if sum(map(text.count, _PARTS)) > _MOST_PARTS:
        raise BadRequest(
            f"The JSON body has more than {_MOST_PARTS:,} lists, objects and values. Send pictures "
            "in base64, not as lists of numbers."
        )
    return json.loads(text)
