"""From probabilities and errors to response bodies and statuses.

Every body is one JSON object that all tutorials' clients can read: `class_id` and `class_name` for
one, `success` and `predictions` with `label` and `probability` for the other.
"""

import json
import os
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from handler import kserve
from handler.errors import AnswerTooLarge, RequestError
from handler.exchange import (
    Body,
    Options,
    Protocol,
    Purpose,
    Request,
    RequestImage,
    Response,
)
from handler.images import Photo
from handler.labels import Label
from handler.multilabel import passing

# Digits after the point: float32 holds no more for a probability near 1.
_PROBABILITY_DIGITS = 7
# float32's sums over a thousand channels are no more exact than this.
_MAP_DIGITS = 6

# TorchServe's `max_response_size`, which it does not tell its workers; `scripts.serve` does, by
# the variable that TorchServe itself has for it. A larger answer ends the worker.
MAX_ANSWER_BYTES = int(os.environ.get("TS_MAX_RESPONSE_SIZE", "6553500"))

# No prediction is shorter.
_LEAST_PREDICTION_BYTES = len('{"label":"","probability":0.0,"class_id":"","class_index":0},')


def encode(body: Body, binary: bytes = b"") -> Response:
    """A JSON answer, with KServe's tensors behind it where there are any.

    An error's body carries its status.

    Raises:
        ValueError: the body holds NaN or infinity, which JSON does not have.
    """
    text = json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n"
    content = text.encode("utf-8")
    status = body.get("code", HTTPStatus.OK)
    if not binary:
        return Response(status, content, "application/json")
    headers = {kserve.BINARY_HEADER.title(): str(len(content))}
    return Response(status, content + binary, "application/octet-stream", headers)


def check_size(response: Response) -> None:
    """Raises `AnswerTooLarge` for what TorchServe would not pass on."""
    if len(response.body) > MAX_ANSWER_BYTES:
        raise _too_large(f"{len(response.body):,}")


def check_topk(request: Request, classes: int) -> None:
    """Raises `AnswerTooLarge` where the predictions that are wanted cannot fit in an answer."""
    if request.purpose is not Purpose.CLASSIFY:
        return
    least = len(request.images) * min(request.options.topk, classes) * _LEAST_PREDICTION_BYTES
    if least > MAX_ANSWER_BYTES:
        raise _too_large(f"more than {least:,}")


def check_labels(request: Request) -> None:
    """Raises `AnswerTooLarge` where the labels that pass cannot fit in an answer."""
    if not request.multilabel or request.purpose is not Purpose.CLASSIFY:
        return
    labels = sum(
        int((image.probabilities >= request.options.threshold).sum())
        for image in request.images
        if image.probabilities is not None
    )
    if (least := labels * _LEAST_PREDICTION_BYTES) > MAX_ANSWER_BYTES:
        raise _too_large(f"more than {least:,}", "a higher threshold")


def _too_large(size: str, instead: str = "a smaller topk") -> AnswerTooLarge:
    return AnswerTooLarge(
        f"The answer would have {size} bytes; at most {MAX_ANSWER_BYTES:,} can be sent. Ask with "
        f"{instead}, for fewer images at once or under shorter names, or for an explanation in "
        "numbers (Accept: application/json)."
    )


def collect(request: Request, model: tuple[str, str], extra: Mapping[str, Any]) -> Response:
    """The answer for all images of one request, in its own protocol.

    Args:
        request: with a result or an error for each of its images. A single image's
            error is the whole request's, with its status; among several images each has its own.
        model: name and version of the model, which KServe V2 names in its answers.
        extra: what every body holds.
    """
    results = [_result(image) for image in request.images]
    single = results[0] if len(results) == 1 else None
    if single is not None and not single["success"]:
        return encode({**single, **extra})
    if request.protocol is Protocol.KSERVE_V1:
        explained = request.purpose is Purpose.EXPLAIN
        return encode({"explanations" if explained else "predictions": results, **extra})
    if request.protocol is Protocol.KSERVE_V2:
        body, binary = kserve.answer(request, results, model)
        return encode({**body, **extra}, binary)
    if single is not None:
        return encode({**single, **extra})
    named = zip(request.images, results, strict=True)
    body = {
        "success": all(result["success"] for result in results),
        "results": [{"name": image.name, **result} for image, result in named],
    }
    return encode({**body, **extra})


def _result(image: RequestImage) -> Body:
    if image.error is not None:
        return error(image.error)
    assert image.result is not None
    return image.result


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (..., classes) to probabilities of the same shape; each row sums to 1."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = exponentials / exponentials.sum(axis=-1, keepdims=True)
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
    predictions = [_prediction(probabilities, labels, int(index)) for index in best_first]
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


def multilabel(
    probabilities: NDArray[np.float32], labels: Sequence[Label], options: Options
) -> Body:
    """The result for one image of a model that gives several labels.

    `labels` holds all that reach their threshold, most probable first, however many predictions are
    wanted. The keys for one class are the first label's.

    Args:
        probabilities: float32 (classes,), each for itself.
        labels: id and name of each class.
        options: how many predictions, and when a class counts as recognised.
    """
    best_first = np.argsort(-probabilities, kind="stable")[: options.topk]
    found = [
        _prediction(probabilities, labels, int(index))
        for index in passing(probabilities, options.threshold)
    ]
    predictions = [_prediction(probabilities, labels, int(index)) for index in best_first]
    first = (found or predictions)[0]
    return {
        "success": True,
        "class_id": first["class_id"] if found else None,
        "class_name": first["label"] if found else None,
        "probability": first["probability"],
        "recognized": bool(found),
        "labels": found,
        "predictions": predictions,
    }


def _prediction(probabilities: NDArray[np.float32], labels: Sequence[Label], index: int) -> Body:
    """One class and how probable it is."""
    return {
        "label": labels[index].class_name,
        "probability": round(float(probabilities[index]), _PROBABILITY_DIGITS),
        "class_id": labels[index].class_id,
        "class_index": index,
    }


def embedded(embedding: NDArray[np.float32]) -> list[float]:
    """float32 (channels,) in the fewest digits that give the same float32 again."""
    return [float(text) for text in map(str, embedding)]


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


def error(cause: RequestError) -> Body:
    """The body for what cannot be answered.

    `error` is where KServe's clients look, and a client cannot be told by a request that could not
    be read.
    """
    return {
        "success": False,
        "code": int(cause.status),
        "type": cause.type,
        "message": str(cause),
        "error": str(cause),
    }
