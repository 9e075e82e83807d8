"""What a batch leaves behind for the operator: Prometheus metrics, and one log line per request.

A metric goes from here to TorchServe's frontend as a printed line. Only those that `metrics.yaml`
lists reach Prometheus; on a server without that file the others are dropped, and nothing fails. A
request's line is JSON, without anything of its images but their size.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ts.context import Context
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes

from handler.errors import InternalError, RequestError
from handler.exchange import Purpose, Request, RequestImage
from handler.settings import ModelCard

logger = logging.getLogger(__name__)

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

_DIGITS = re.compile(r"[0-9]{1,18}")

_VERSION_DIGITS = 8


@dataclass(frozen=True)
class Times:
    """How long a batch took, in seconds."""

    decoding: float
    inference: float


@dataclass(frozen=True)
class _Outcome:
    """What became of one image. TorchServe drops a metric that has an empty label."""

    name: str
    error_type: str = "none"


class Metrics:
    """Counts and logs what each batch came to."""

    def __init__(self, context: Context, card: ModelCard) -> None:
        """Makes the metrics known to TorchServe's worker.

        The version label tells archives apart that carry the same version number: its digits
        change with the weights and with the handler.
        """
        model_version = context.manifest["model"]["modelVersion"]
        self._version = f"{model_version}+{card.inputs_sha256[:_VERSION_DIGITS]}"
        self._counters = {
            name: _metric(context, name, labels, MetricTypes.COUNTER)
            for name, labels in _COUNTERS.items()
        }
        self._histograms = {
            name: _metric(context, name, ("model_version",), MetricTypes.HISTOGRAM)
            for name in _HISTOGRAMS
        }

    @property
    def model_version(self) -> str:
        """The version label, such as "1.0+1a2b3c4d"."""
        return self._version

    def record(self, requests: Sequence[Request], times: Times) -> None:
        """Takes note of a batch; costs some microseconds per image.

        Args:
            requests: after they were answered.
            times: of the whole batch.
        """
        try:
            self._record(requests, times)
        except Exception:  # the answers are made: nothing that is only counted may lose them
            logger.exception("A batch could not be counted")

    def _record(self, requests: Sequence[Request], times: Times) -> None:
        outcomes = [_outcomes(request) for request in requests]
        for outcome, count in Counter(o for of_one in outcomes for o in of_one).items():
            self._count("densenet_images_total", count, outcome.name, outcome.error_type)
        statuses = Counter(request.response.status for request in requests if request.response)
        for status, count in statuses.items():
            self._count("densenet_requests_total", count, str(int(status)))
        images = [image for request in requests for image in request.images]
        classified = [image.probabilities for image in images if image.probabilities is not None]
        if classified:
            self._observe("densenet_decode_seconds", times.decoding)
            self._observe("densenet_inference_seconds", times.inference)
            self._observe("densenet_batch_images", len(classified))
        for request in requests:
            if request.purpose is Purpose.CLASSIFY:
                for image in request.images:
                    if image.probabilities is not None:
                        best = float(image.probabilities.max())
                        self._observe("densenet_best_probability", best)
        batch = {
            "batch_requests": len(requests),
            "batch_images": len(images),
            "decode_ms": round(times.decoding * 1000, 1),
            "inference_ms": round(times.inference * 1000, 1),
            "model_version": self._version,
        }
        for request, of_one in zip(requests, outcomes, strict=True):
            _log(request, of_one, batch)

    def _count(self, name: str, value: int, *labels: str) -> None:
        self._counters[name].add_or_update(value, [*labels, self._version])

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].add_or_update(f"{value:.6f}", [self._version])


def _outcomes(request: Request) -> list[_Outcome]:
    """What became of a request's images; of one that failed as a whole, what became of it."""
    if request.error is not None:
        return [_failure(request.error)]
    return [_outcome(image) for image in request.images]


def _outcome(image: RequestImage) -> _Outcome:
    if image.error is not None:
        return _failure(image.error)
    result = image.result or {}
    if "recognized" not in result:
        return _Outcome("explained")
    return _Outcome("recognized" if result["recognized"] else "unrecognized")


def _failure(error: RequestError) -> _Outcome:
    return _Outcome("failed" if isinstance(error, InternalError) else "refused", error.type)


def _log(request: Request, outcomes: Sequence[_Outcome], batch: Mapping[str, Any]) -> None:
    assert request.response is not None
    line = {
        _FIRST_KEY: datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "id": _request_id(request),
        "status": int(request.response.status),
        "outcomes": [o.name if o.error_type == "none" else o.error_type for o in outcomes],
        "bytes_in": _length(request),
        "bytes_out": len(request.response.body),
        **batch,
    }
    _request_log.info(json.dumps(line, separators=(",", ":")))


def _metric(context: Context, name: str, labels: tuple[str, ...], metric_type: MetricTypes) -> Any:
    """The metric that `metrics.yaml` declares, or one that only the worker knows."""
    try:
        return context.metrics.get_metric(name, metric_type)
    except MetricsCacheKeyError:
        return context.metrics.add_metric_to_cache(name, "Count", list(labels), metric_type)


def _request_id(request: Request) -> str:
    """The id that the gateway or the client gave the request, if it is fit for a log."""
    given = request.header("x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else request.request_id


def _length(request: Request) -> int | None:
    """Bytes of the request's body as announced; None over gRPC, which announces nothing."""
    given = request.header("content-length")
    return int(given) if _DIGITS.fullmatch(given) else None
