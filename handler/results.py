"""From probabilities and errors to results, one JSON object per image.

Every object has all keys that the tutorials' clients read: `class_id` and `class_name` for one,
`success` and `predictions` with `label` and `probability` for the other.
"""

import os
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from handler.decoding.pillow import DecodedImage
from handler.errors import AnswerTooLarge, RequestError
from handler.inference.activation import labels_above
from handler.labels import Label
from handler.request import Body, Options, Purpose, Request, RequestImage, Response

# Digits after the point: float32 holds no more for a probability near 1.
_PROBABILITY_DIGITS = 7
# float32's sums over a thousand channels are no more exact than this.
_MAP_DIGITS = 6

# TorchServe's `max_response_size`. It does not pass it to its workers; `scripts.serve` does, in the
# variable that TorchServe itself has for it. A larger response crashes the worker.
MAX_RESPONSE_BYTES = int(os.environ.get("TS_MAX_RESPONSE_SIZE", "6553500"))

# No prediction is shorter.
_MIN_PREDICTION_BYTES = len('{"label":"","probability":0.0,"class_id":"","class_index":0},')


def check_response_size(response: Response) -> None:
    """Raise `AnswerTooLarge` if TorchServe would not pass the response on."""
    if len(response.body) > MAX_RESPONSE_BYTES:
        raise _too_large(f"{len(response.body):,}")


def check_result_count(request: Request, classes: int, *, multilabel: bool) -> None:
    """Raise `AnswerTooLarge` if the predictions cannot fit, before any of them is formatted."""
    if request.purpose is not Purpose.CLASSIFY:
        return
    options = request.options
    predictions = len(request.images) * min(options.topk, classes)
    if (size := predictions * _MIN_PREDICTION_BYTES) > MAX_RESPONSE_BYTES:
        raise _too_large(f"more than {size:,}")
    if not multilabel:
        return
    labels = sum(
        int((image.probabilities >= options.threshold).sum())
        for image in request.images
        if image.probabilities is not None
    )
    if (size := labels * _MIN_PREDICTION_BYTES) > MAX_RESPONSE_BYTES:
        raise _too_large(f"more than {size:,}", "a higher threshold")


def _too_large(size: str, instead: str = "a smaller topk") -> AnswerTooLarge:
    return AnswerTooLarge(
        f"The response would have {size} bytes; at most {MAX_RESPONSE_BYTES:,} can be sent. Ask "
        f"with {instead}, for fewer images at once or under shorter names, or for an explanation "
        "in numbers (Accept: application/json)."
    )


def classification(
    probabilities: NDArray[np.float32], labels: Sequence[Label], options: Options
) -> Body:
    """Return one image's result.

    Args:
        probabilities: float32 (classes,), summing to 1.
        labels: id and name of each class.
        options: number of predictions and confidence threshold.
    """
    predictions = _top_predictions(probabilities, labels, options.topk)
    best = predictions[0]
    recognized = bool(probabilities[best["class_index"]] >= options.threshold)
    return {
        "success": True,
        "class_id": best["class_id"] if recognized else None,
        "class_name": best["label"] if recognized else None,
        "probability": best["probability"],
        "recognized": recognized,
        "predictions": predictions,
    }


def multilabel_classification(
    probabilities: NDArray[np.float32], labels: Sequence[Label], options: Options
) -> Body:
    """Return one image's result of a multi-label model.

    `labels` holds all that reach their threshold, most probable first, whatever topk is. The keys
    for one class are the first label's.

    Args:
        probabilities: float32 (classes,), each for itself.
        labels: id and name of each class.
        options: number of predictions and confidence thresholds.
    """
    predictions = _top_predictions(probabilities, labels, options.topk)
    found = [
        _prediction(probabilities, labels, int(index))
        for index in labels_above(probabilities, options.threshold)
    ]
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


def _top_predictions(
    probabilities: NDArray[np.float32], labels: Sequence[Label], topk: int
) -> list[Body]:
    best_first = np.argsort(-probabilities, kind="stable")[:topk]
    return [_prediction(probabilities, labels, int(index)) for index in best_first]


def _prediction(probabilities: NDArray[np.float32], labels: Sequence[Label], index: int) -> Body:
    return {
        "label": labels[index].class_name,
        "probability": round(float(probabilities[index]), _PROBABILITY_DIGITS),
        "class_id": labels[index].class_id,
        "class_index": index,
    }


def embedding_to_json(embedding: NDArray[np.float32]) -> list[float]:
    """Return float32 values in the fewest digits that give the same float32 again."""
    return [float(text) for text in map(str, embedding.ravel())]


def explanation(
    image: DecodedImage,
    activation: NDArray[np.float32],
    label: Label,
    class_index: int,
    probability: float,
) -> Body:
    """Return one image's class activation map in numbers.

    Args:
        image: gives the sizes.
        activation: float32 (height, width), see `explain.class_activation_map`.
        label: of the class that is explained.
        class_index: of the same.
        probability: of the same.
    """
    (width, height), (left, top, right, bottom) = image.size, image.crop
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


def heat_map_response(png: bytes, result: Body) -> Response:
    """Return a PNG, with the explained class in the headers."""
    headers = {
        "X-Class-Index": str(result["class_index"]),
        "X-Class-Id": _header_value(result["class_id"]),
        "X-Class-Name": _header_value(result["class_name"]),
        "X-Probability": f"{result['probability']:.{_PROBABILITY_DIGITS}f}",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(HTTPStatus.OK, png, "image/png", headers)


def _header_value(text: str) -> str:
    """Return ASCII; other characters of a class index are percent-encoded."""
    return quote(text, safe=" !'()*,-./;:&=+")


def result_of(image: RequestImage) -> Body:
    """Return an image's result, or the body for its error."""
    if image.error is not None:
        return error_body(image.error)
    assert image.result is not None
    return image.result


def error_body(error: RequestError) -> Body:
    """Return the body for an error; KServe's and Hugging Face's clients read `error`."""
    return {
        "success": False,
        "code": int(error.status),
        "type": error.type,
        "message": str(error),
        "error": str(error),
    }
