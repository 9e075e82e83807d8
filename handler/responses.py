"""From probabilities and errors to response bodies and statuses.

Every body is one JSON object that all tutorials' clients can read: `class_id` and `class_name` for
one, `success` and `predictions` with `label` and `probability` for the other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import ClientError
from handler.inputs import Options
from handler.labels import Label

# Digits after the point: float32 holds no more for a probability near 1.
_PROBABILITY_DIGITS = 7

Body = dict[str, Any]


@dataclass(frozen=True)
class Response:
    """What one request is answered.

    Attributes:
        status: HTTP status code.
        body: the encoded body.
        content_type: its media type.
    """

    status: int
    body: bytes
    content_type: str


def encode(body: Body) -> Response:
    """A JSON answer; an error's body carries its status.

    Raises:
        ValueError: the body holds NaN or infinity, which JSON does not have.
    """
    text = json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n"
    return Response(body.get("code", HTTPStatus.OK), text.encode("utf-8"), "application/json")


def collect(names: Sequence[str], results: Sequence[Body]) -> Body:
    """The body for all images of one request: one image's own result, or a list of all."""
    if len(results) == 1:
        return results[0]
    return {
        "success": all(result["success"] for result in results),
        "results": [{"name": name, **result} for name, result in zip(names, results, strict=True)],
    }


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (N, classes) to probabilities of the same shape; each row sums to 1."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def classification(
    probabilities: NDArray[np.float32], labels: Sequence[Label], options: Options
) -> Body:
    """The result for one image.

    Args:
        probabilities: float32 (classes,), summing to 1.
        labels: id and name of each class.
        options: how many predictions, and when the best one counts as recognised.
    """
    best_first = np.argsort(-probabilities, kind="stable")[: options.topk]
    predictions = [
        {
            "label": labels[index].class_name,
            "probability": round(float(probabilities[index]), _PROBABILITY_DIGITS),
            "class_id": labels[index].class_id,
            "class_index": int(index),
        }
        for index in best_first
    ]
    best = predictions[0]
    recognized = bool(probabilities[best_first[0]] >= options.threshold)
    return {
        "success": True,
        "class_id": best["class_id"] if recognized else None,
        "class_name": best["label"] if recognized else None,
        "probability": best["probability"],
        "recognized": recognized,
        "predictions": predictions,
    }


def error(cause: ClientError) -> Body:
    """The body for something the client sent that cannot be served."""
    return _error(cause.status, cause.type, str(cause))


def internal_error(request_id: str) -> Body:
    """The body for a fault of the server's own: no detail but the id to find it by in the log."""
    return _error(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "InternalError",
        f"The server failed on this request; its log has the cause under id {request_id}.",
    )


def _error(status: int, type_name: str, message: str) -> Body:
    return {"success": False, "code": int(status), "type": type_name, "message": message}
