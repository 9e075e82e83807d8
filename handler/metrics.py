"""Record metrics for Prometheus and log one line of JSON per request.

The worker prints a metric as a line for TorchServe's frontend, which drops metrics that
`metrics.yaml` does not list. A request's log line contains no image data except sizes.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import chain
from typing import Any

from ts.context import Context
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes

from handler.archive import Archive
from handler.errors import InternalError, RequestError
from handler.pipeline import Times
from handler.request import Body, Purpose, Request

logger = logging.getLogger(__name__)

# The log configuration recognizes lines for `requests.log` by their first key.
_request_log = logging.getLogger("densenet.requests")
_FIRST_KEY = "time"

_COUNTERS = {
    "images_total": ("outcome", "error_type"),
    "requests_total": ("status",),
    "precision_images_total": ("precision", "archive_precision"),
}
_HISTOGRAMS = ("decode_seconds", "inference_seconds", "batch_images", "best_probability")

# Each prefix with the labels of all its metrics. The second prefix is deprecated and stays for one
# release.
_PREFIXES = {
    "image_classifier_": ("model_name", "model_version"),
    "densenet_": ("model_version",),
}

# Accepted ids from a gateway or a client; other characters could forge log lines.
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)

_DIGITS = re.compile(r"[0-9]{1,18}")

_VERSION_DIGITS = 8


# The outcome of one image and the type of its error. TorchServe drops a metric that has an empty
# label.
_Outcome = tuple[str, str]
_NO_ERROR = "none"


class Metrics:
    """Counts and logs the outcome of each batch.

    Attributes:
        model_version: such as "1.0+1a2b3c4d". It distinguishes archives with the same version
            number: the digits change with the weights and with the handler.
    """

    def __init__(self, context: Context, archive: Archive, precision: str) -> None:
        """Register the metrics with TorchServe's worker; `precision` is the served one."""
        digest = archive.card.inputs_sha256[:_VERSION_DIGITS]
        self.model_version = f"{archive.version}+{digest}"
        self._precisions = precision, archive.card.precision
        values = {"model_name": archive.name, "model_version": self.model_version}
        # Name to TorchServe's metrics, one per prefix, with the values of their common labels.
        self._metrics: dict[str, list[tuple[Any, list[str]]]] = {}
        for prefix, common in _PREFIXES.items():
            last = [values[label] for label in common]
            for name, labels in _COUNTERS.items():
                metric = _metric(context, prefix + name, (*labels, *common), MetricTypes.COUNTER)
                self._metrics.setdefault(name, []).append((metric, last))
            for name in _HISTOGRAMS:
                metric = _metric(context, prefix + name, common, MetricTypes.HISTOGRAM)
                self._metrics.setdefault(name, []).append((metric, last))

    def record(self, requests: Sequence[Request], times: Times) -> None:
        """Record a batch with its responses; takes some microseconds per image."""
        try:
            self._record(requests, times)
        except Exception:  # a failing metric must not lose the responses
            logger.exception("A batch was not counted")

    def _record(self, requests: Sequence[Request], times: Times) -> None:
        outcomes = [_outcomes(request) for request in requests]
        for outcome, count in Counter(chain.from_iterable(outcomes)).items():
            self._count("images_total", count, *outcome)
        statuses = Counter(request.response.status for request in requests if request.response)
        for status, count in statuses.items():
            self._count("requests_total", count, str(int(status)))
        images = [image for request in requests for image in request.images]
        classified = sum(image.probabilities is not None for image in images)
        if classified:
            self._observe("decode_seconds", times.decoding)
            self._observe("inference_seconds", times.inference)
            self._observe("batch_images", classified)
            self._count("precision_images_total", classified, *self._precisions)
        for request in requests:
            for image in request.images:
                if image.probabilities is not None and request.purpose is Purpose.CLASSIFY:
                    self._observe("best_probability", float(image.probabilities.max()))
        batch = {
            "batch_requests": len(requests),
            "batch_images": len(images),
            "decode_ms": round(times.decoding * 1000, 1),
            "inference_ms": round(times.inference * 1000, 1),
            "model_version": self.model_version,
        }
        for request, own in zip(requests, outcomes, strict=True):
            _log(request, own, batch)

    def _count(self, name: str, value: int, *labels: str) -> None:
        for metric, last in self._metrics[name]:
            metric.add_or_update(value, [*labels, *last])

    def _observe(self, name: str, value: float) -> None:
        for metric, last in self._metrics[name]:
            metric.add_or_update(f"{value:.6f}", last)


def _outcomes(request: Request) -> list[_Outcome]:
    """Return the outcomes of a request's images, or the request's own if it failed as a whole."""
    if request.error is not None:
        return [_outcome(request.error, {})]
    return [_outcome(image.error, image.result or {}) for image in request.images]


def _outcome(error: RequestError | None, result: Body) -> _Outcome:
    if error is not None:
        return "failed" if isinstance(error, InternalError) else "refused", error.type
    if "recognized" not in result:
        return "explained", _NO_ERROR
    return "recognized" if result["recognized"] else "unrecognized", _NO_ERROR


def _log(request: Request, outcomes: Sequence[_Outcome], batch: Mapping[str, Any]) -> None:
    assert request.response is not None
    given, length = request.header("x-request-id"), request.header("content-length")
    line = {
        _FIRST_KEY: datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "id": given if _REQUEST_ID.fullmatch(given) else request.request_id,
        "status": int(request.response.status),
        "outcomes": [name if error == _NO_ERROR else error for name, error in outcomes],
        # gRPC has no Content-Length.
        "bytes_in": int(length) if _DIGITS.fullmatch(length) else None,
        "bytes_out": len(request.response.body),
        **batch,
    }
    _request_log.info(json.dumps(line, separators=(",", ":")))


def _metric(context: Context, name: str, labels: tuple[str, ...], metric_type: MetricTypes) -> Any:
    """Return the metric that `metrics.yaml` declares, or a new one in the worker."""
    try:
        return context.metrics.get_metric(name, metric_type)
    except MetricsCacheKeyError:
        return context.metrics.add_metric_to_cache(name, "Count", list(labels), metric_type)
