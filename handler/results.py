"""Convert probabilities and errors to results, one JSON object per image.

Each object has all keys that the clients of both tutorials read: `class_id` and `class_name` of
one, `success` and `predictions` with `label` and `probability` of the other.
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

# Decimal places: float32 has no more for a probability near 1.
_PROBABILITY_DIGITS = 7
# The accuracy of float32 sums over a thousand channels.
_MAP_DIGITS = 6

# TorchServe's `max_response_size`; a larger response crashes the worker. TorchServe does not pass
# it to its workers; `scripts.serve` does, in TorchServe's own environment variable for it.
MAX_RESPONSE_BYTES = int(os.environ.get("TS_MAX_RESPONSE_SIZE", "6553500"))

# The minimum length of a prediction in JSON.
_MIN_PREDICTION_BYTES = len('{"label":"","probability":0.0,"class_id":"","class_index":0},')


def check_response_size(response: Response) -> None:
    """Raise `AnswerTooLarge` if the response exceeds TorchServe's maximum size."""
    if len(response.body) > MAX_RESPONSE_BYTES:
        raise _too_large(f"{len(response.body):,}")


def check_result_count(request: Request, classes: int, *, multilabel: bool) -> None:
    """Raise `AnswerTooLarge` if the predictions cannot fit, before formatting them."""
    if request.purpose is not Purpose.CLASSIFY:
        return
    options = request.options
    counts = [(len(request.images) * min(options.topk, classes), "a smaller topk")]
    if multilabel:
        probabilities = (image.probabilities for image in request.images)
        labels = sum(int((p >= options.threshold).sum()) for p in probabilities if p is not None)
        counts.append((labels, "a higher threshold"))
    for count, instead in counts:
        if (size := count * _MIN_PREDICTION_BYTES) > MAX_RESPONSE_BYTES:
            raise _too_large(f"more than {size:,}", instead)


def _too_large(size: str, instead: str = "a smaller topk") -> AnswerTooLarge:
    return AnswerTooLarge(
        f"The response would have {size} bytes; at most {MAX_RESPONSE_BYTES:,} can be sent. Ask "
        f"with {instead}, for fewer images at once or under shorter names, or for an explanation "
        "in numbers (Accept: application/json)."
    )


def classification(
    probabilities: NDArray[np.float32],
    labels: Sequence[Label],
    options: Options,
    *,
    multilabel: bool = False,
) -> Body:
    """Return one image's result.

    That of a multi-label model also contains `labels`: all classes that reach their threshold, most
    probable first, independent of topk. `class_id`, `class_name` and `probability` are those of the
    first label.

    Args:
        probabilities: float32 (classes,), summing to 1 unless the model is multi-label.
        labels: id and name of each class.
        options: number of predictions and confidence thresholds.
        multilabel: whether an image can have any number of labels.
    """
    best_first = np.argsort(-probabilities, kind="stable")[: options.topk]
    recognized = labels_above(probabilities, options.threshold)
    predictions, found = (
        [_prediction(probabilities, labels, int(index)) for index in indices]
        for indices in (best_first, recognized if multilabel else recognized[:1])
    )
    first = (found or predictions)[0]
    return {
        "success": True,
        "class_id": first["class_id"] if found else None,
        "class_name": first["label"] if found else None,
        "probability": first["probability"],
        "recognized": bool(found),
        **({"labels": found} if multilabel else {}),
        "predictions": predictions,
    }


def _prediction(probabilities: NDArray[np.float32], labels: Sequence[Label], index: int) -> Body:
    return {
        "label": labels[index].class_name,
        "probability": round(float(probabilities[index]), _PROBABILITY_DIGITS),
        "class_id": labels[index].class_id,
        "class_index": index,
    }


def embedding_to_json(embedding: NDArray[np.float32]) -> list[float]:
    """Return float32 values with the fewest digits that parse to the same float32."""
    return [float(text) for text in map(str, embedding.ravel())]


def explanation(
    image: DecodedImage,
    activation: NDArray[np.float32],
    label: Label,
    class_index: int,
    probability: float,
) -> Body:
    """Return one image's class activation map as numbers, for the class at `class_index`.

    `activation` is float32 (height, width), see `explain.class_activation_map`.
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
    """Return a response with the PNG, and the explained class in the headers, percent-encoded."""
    class_id, class_name = (
        quote(result[key], safe=" !'()*,-./;:&=+") for key in ("class_id", "class_name")
    )
    headers = {
        "X-Class-Index": str(result["class_index"]),
        "X-Class-Id": class_id,
        "X-Class-Name": class_name,
        "X-Probability": f"{result['probability']:.{_PROBABILITY_DIGITS}f}",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(HTTPStatus.OK, png, "image/png", headers)


def result_of(image: RequestImage) -> Body:
    """Return an image's result, or the JSON object of its error."""
    if image.error is not None:
        return error_body(image.error)
    assert image.result is not None
    return image.result


def error_body(error: RequestError) -> Body:
    """Return the JSON object of an error; KServe's and Hugging Face's clients read `error`."""
    return {
        "success": False,
        "code": int(error.status),
        "type": error.type,
        "message": str(error),
        "error": str(error),
    }
