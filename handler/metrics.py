"""What a batch leaves behind for the operator: metrics for Prometheus, and a line a request.

A metric goes from here to TorchServe's frontend as a printed line. Only those that `metrics.yaml`
lists reach Prometheus; on a server without that file the others are dropped, and nothing fails. A
request's line is JSON, without anything of its images but their size.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ts.context import Context
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes

from handler.errors import ClientError
from handler.images import Decoded, Photo
from handler.inputs import ImagesRequest, Request
from handler.responses import Response
from handler.settings import ModelCard, Settings

# Its lines are what the log configuration puts into `requests.log`: they begin with this key.
_request_log = logging.getLogger("densenet.requests")
_FIRST_KEY = "time"

_COUNTERS = {
    "densenet_images_total": ("outcome", "error_type", "model_version"),
    "densenet_requests_total": ("status", "model_version"),
}
_HISTOGRAMS = (
    "densenet_decode_seconds",
    "densenet_inference_seconds",
    "densenet_batch_images",
    "densenet_best_probability",
)

# An id that a gateway or a client chose; anything else could forge lines of the log.
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)

_VERSION_DIGITS = 8


@dataclass(frozen=True)
class Batch:
    """One batch after it was answered; the sequences have an element for each request.

    Attributes:
        requests: what was asked, or what was wrong with it.
        images: for each request, for each image, what was decoded or what was wrong.
        probabilities: float32 (classes,) for each image that was classified, in order; those that
            were explained are not among them.
        answers: as they were sent.
        decode_seconds: of the whole batch.
        inference_seconds: of the whole batch.
    """

    requests: Sequence[Request | ClientError]
    images: Sequence[Sequence[Decoded]]
    probabilities: Sequence[NDArray[np.float32]]
    answers: Sequence[Response]
    decode_seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class _Outcome:
    """What became of one image. TorchServe drops a metric that has an empty label."""

    name: str
    error_type: str = "none"


class Metrics:
    """Counts and logs what each batch came to."""

    def __init__(self, context: Context, card: ModelCard, settings: Settings) -> None:
        """Makes the metrics known to TorchServe's worker.

        The version label tells archives apart that carry the same version number: its digits
        change with the weights and with the handler.
        """
        model_version = context.manifest["model"]["modelVersion"]
        self._version = f"{model_version}+{card.inputs_sha256[:_VERSION_DIGITS]}"
        self._threshold = settings.threshold
        self._counters = {
            name: _metric(context, name, labels, MetricTypes.COUNTER)
            for name, labels in _COUNTERS.items()
        }
        self._histograms = {
            name: _metric(context, name, ("model_version",), MetricTypes.HISTOGRAM)
            for name in _HISTOGRAMS
        }

    def record(self, batch: Batch, context: Context) -> None:
        """Takes note of a batch; costs some microseconds an image, see the README."""
        outcomes = list(self._outcomes(batch))
        images = Counter(outcome for request in outcomes for outcome in request)
        for outcome, count in images.items():
            self._count("densenet_images_total", count, outcome.name, outcome.error_type)
        for status, count in Counter(answer.status for answer in batch.answers).items():
            self._count("densenet_requests_total", count, str(status))
        through_the_model = sum(n for outcome, n in images.items() if outcome.name != "refused")
        if through_the_model:
            self._observe("densenet_decode_seconds", batch.decode_seconds)
            self._observe("densenet_inference_seconds", batch.inference_seconds)
            self._observe("densenet_batch_images", through_the_model)
        for probabilities in batch.probabilities:
            self._observe("densenet_best_probability", float(probabilities.max()))
        for index, answer in enumerate(batch.answers):
            headers = {k.lower(): v for k, v in context.get_all_request_header(index).items()}
            request_id = _request_id(headers) or str(context.get_request_id(index))
            self._log(batch, answer, outcomes[index], request_id, _length(headers))

    def failed(self, requests: int) -> None:
        """Takes note of a batch that failed whole, by a fault of the server's own."""
        self._count("densenet_requests_total", requests, "500")

    def _count(self, name: str, value: int, *labels: str) -> None:
        self._counters[name].add_or_update(value, [*labels, self._version])

    @property
    def model_version(self) -> str:
        """The version label, such as "1.0+1a2b3c4d"."""
        return self._version

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].add_or_update(f"{value:.6f}", [self._version])

    def _outcomes(self, batch: Batch) -> Iterator[list[_Outcome]]:
        """For each request what became of its images."""
        probabilities = iter(batch.probabilities)
        for request, images in zip(batch.requests, batch.images, strict=True):
            if isinstance(request, ClientError):
                yield [_Outcome("refused", request.type)]
                continue
            threshold = (
                request.options.threshold if isinstance(request, ImagesRequest) else self._threshold
            )
            yield [
                _Outcome("refused", image.type)
                if isinstance(image, ClientError)
                else _Outcome("explained")
                if isinstance(image, Photo)
                else _Outcome(
                    "recognized" if next(probabilities).max() >= threshold else "unrecognized"
                )
                for image in images
            ]

    def _log(
        self,
        batch: Batch,
        answer: Response,
        outcomes: list[_Outcome],
        request_id: str,
        bytes_in: int | None,
    ) -> None:
        line = {
            _FIRST_KEY: datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": request_id,
            "status": int(answer.status),
            "outcomes": [o.error_type if o.name == "refused" else o.name for o in outcomes],
            "bytes_in": bytes_in,
            "bytes_out": len(answer.body),
            "batch_requests": len(batch.answers),
            "batch_images": sum(map(len, batch.images)),
            "decode_ms": round(batch.decode_seconds * 1000, 1),
            "inference_ms": round(batch.inference_seconds * 1000, 1),
            "model_version": self._version,
        }
        _request_log.info(json.dumps(line, separators=(",", ":")))


def _metric(context: Context, name: str, labels: tuple[str, ...], metric_type: MetricTypes) -> Any:
    """The metric that `metrics.yaml` declares, or one that only the worker knows."""
    try:
        return context.metrics.get_metric(name, metric_type)
    except MetricsCacheKeyError:
        return context.metrics.add_metric_to_cache(name, "Count", list(labels), metric_type)


def _request_id(headers: Mapping[str, Any]) -> str | None:
    """The id that the gateway or the client gave the request, if it is fit for a log."""
    given = headers.get("x-request-id")
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else None


def _length(headers: Mapping[str, Any]) -> int | None:
    """Bytes of the request's body as announced; None over gRPC, which announces nothing."""
    given = headers.get("content-length")
    return int(given) if isinstance(given, str) and given.isdecimal() else None
