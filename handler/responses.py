"""From probabilities and errors to response bodies and statuses.

Every body is one JSON object that all tutorials' clients can read: `class_id` and `class_name` for
one, `success` and `predictions` with `label` and `probability` for the other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from handler.errors import ClientError
from handler.images import Photo
from handler.inputs import Form, ImagesRequest, Options
from handler.labels import Label

# Digits after the point: float32 holds no more for a probability near 1.
_PROBABILITY_DIGITS = 7
# float32's sums over a thousand channels are no more exact than this.
_MAP_DIGITS = 6

Body = dict[str, Any]


@dataclass(frozen=True)
class Response:
    """What one request is answered.

    Attributes:
        status: HTTP status code.
        body: the encoded body.
        content_type: its media type.
        headers: response headers beside that one.
    """

    status: int
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


def encode(body: Body) -> Response:
    """A JSON answer; an error's body carries its status.

    Raises:
        ValueError: the body holds NaN or infinity, which JSON does not have.
    """
    text = json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n"
    return Response(body.get("code", HTTPStatus.OK), text.encode("utf-8"), "application/json")


def collect(
    request: ImagesRequest,
    results: Sequence[Body],
    model: tuple[str, str],
    *,
    explained: bool = False,
) -> Body:
    """The body for all images of one request, in the form in which it asked.

    Args:
        request: what was asked.
        results: a result or an error for each of its images. A single image's error is the
            whole request's, with its status; among several images each has its own.
        model: name and version of the model, which KServe V2 names in its answers.
        explained: the results are explanations.
    """
    if len(results) == 1 and not results[0]["success"]:
        single = results[0]
        return {**single, "error": single["message"]} if request.form is Form.KSERVE_V2 else single
    if request.form is Form.KSERVE_V1:
        return {"explanations" if explained else "predictions": list(results)}
    if request.form is Form.KSERVE_V2:
        return _kserve_v2(request, results, model, explained=explained)
    if len(results) == 1:
        return results[0]
    names = [part.name for part in request.images]
    return {
        "success": all(result["success"] for result in results),
        "results": [{"name": name, **result} for name, result in zip(names, results, strict=True)],
    }


def _kserve_v2(
    request: ImagesRequest, results: Sequence[Body], model: tuple[str, str], *, explained: bool
) -> Body:
    """Tensors with an element an image; `result` holds each whole result as JSON text."""

    def tensor(name: str, datatype: str, data: list[Any]) -> Body:
        return {"name": name, "datatype": datatype, "shape": [len(results)], "data": data}

    outputs = [
        tensor("class_id", "BYTES", [result.get("class_id") or "" for result in results]),
        tensor("class_name", "BYTES", [result.get("class_name") or "" for result in results]),
        tensor("probability", "FP32", [result.get("probability", 0.0) for result in results]),
        tensor("result", "BYTES", [json.dumps(result, allow_nan=False) for result in results]),
    ]
    if not explained:
        recognized = [result.get("recognized", False) for result in results]
        outputs.insert(-1, tensor("recognized", "BOOL", recognized))
    name, version = model
    body: Body = {"model_name": name, "model_version": version, "outputs": outputs}
    return {"id": request.request_id, **body} if request.request_id is not None else body


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


def explanation(
    photo: Photo,
    activation: NDArray[np.float32],
    label: Label,
    class_index: int,
    probability: float,
) -> Body:
    """The numbers of one image's class activation map.

    Args:
        photo: the image.
        activation: float32 (height, width), see `explain.class_activation_map`.
        label: of the class that is explained.
        class_index: of the same.
        probability: of the same.
    """
    (width, height), (left, top, right, bottom) = photo.size, photo.crop
    return {
        "success": True,
        "class_id": label.class_id,
        "class_name": label.class_name,
        "class_index": class_index,
        "probability": round(probability, _PROBABILITY_DIGITS),
        "map": [[round(float(value), _MAP_DIGITS) for value in row] for row in activation],
        "image": {"width": width, "height": height},
        "crop": {"left": left, "top": top, "right": right, "bottom": bottom},
    }


def picture(content: bytes, label: Label, class_index: int, probability: float) -> Response:
    """A PNG, with the class that it explains in the headers."""
    headers = {
        "X-Class-Index": str(class_index),
        "X-Class-Id": _header_value(label.class_id),
        "X-Class-Name": _header_value(label.class_name),
        "X-Probability": f"{probability:.{_PROBABILITY_DIGITS}f}",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(HTTPStatus.OK, content, "image/png", headers)


def _header_value(text: str) -> str:
    """ASCII; whatever else an archive's class index holds is percent-encoded."""
    return quote(text, safe=" !'()*,-./;:&=+")


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
