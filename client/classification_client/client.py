"""Send images to the service and retry transient errors, since requests are idempotent.

A full queue, a restart of the server and a lost connection are transient. An unknown host name, a
TLS error and a rejected request are permanent.
"""

import errno
import http.client
import ssl
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader, NameResolutionError, ProtocolError
from urllib3.util import Retry

from classification_client.errors import RejectedError, TransientError, UnavailableError
from classification_client.reading import check_unchanged, read
from classification_client.responses import Classification, ModelVersion
from classification_client.retrying import tries

# The server's queue is full, its worker crashed on the request, or a gateway timed out.
_TRANSIENT_STATUSES = {408, 429, 502, 503, 504, 507}
_LOST_WORKER = "Worker died"
# OpenSSL's reasons if a server answers a TLS handshake with plain HTTP, and a line of nginx's error
# page for the reverse.
_NOT_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
_NGINX_EXPECTS_TLS = "plain HTTP request was sent to HTTPS port"
_EXPECTS_TLS = "The port expects TLS: use https:// instead of http://."
_PROBE_SECONDS = 2.0

# The service's default limit per request, minus the form around the image. A server may close the
# connection during a larger upload.
MAX_IMAGE_BYTES = 20_971_520 - 4096
# Larger images are rejected without sending them: each is read into memory.
_MAX_BYTES = 500_000_000


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request and of its retries.

    Attributes:
        topk: number of predictions; None for the server's default.
        threshold: confidence threshold, 0 to 1; None for the server's, which may differ per class.
        patience: time limit of an image's retries, in seconds; 0 for one attempt.
        timeout: time limit of one attempt, in seconds.
        key: the API key, if a gateway requires one.
        headers: additional HTTP headers, such as one with a token.
        embedding: request the embedding too.
    """

    topk: int | None = None
    threshold: float | None = None
    patience: float = 120.0
    timeout: float = 60.0
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    embedding: bool = False


class Client(AbstractContextManager["Client"]):
    """Classifies images; can be shared between threads."""

    def __init__(
        self, url: str, options: RequestOptions | None = None, connections: int = 16
    ) -> None:
        """Take the service's URL; `connections` is the number of threads that share the client."""
        self.url = url
        self.options = options or RequestOptions()
        # requests omits form fields that are None.
        self._fields: dict[str, Any] = {
            "topk": self.options.topk,
            "threshold": self.options.threshold,
            "embedding": "true" if self.options.embedding else None,
        }
        self._session = requests.Session()
        # Behind the gateway, workers skip requests that have waited longer than this.
        self._session.headers["X-Request-Timeout"] = f"{self.options.timeout:g}"
        self._session.headers.update(self.options.headers)
        if self.options.key is not None:
            self._session.headers["X-API-Key"] = self.options.key
        self._session.auth = lambda request: request  # ignore .netrc, which would replace a token
        # Do not use the environment's proxies (http_proxy, ALL_PROXY, ...) for loopback.
        host = urlsplit(url).hostname or ""
        self._proxies = {"no_proxy": host} if _is_loopback(host) else None
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def classify(self, image: Path | bytes) -> Classification:
        """Classify one image, a file or its bytes.

        Raises:
            RejectedError: the server rejects the image.
            UnavailableError: the server is unavailable until `RequestOptions.patience` has passed.
            TransientError: reading the file failed, with retries, for the same time.
            OSError: the file cannot be read, for a permanent reason.
        """
        return self._retry(partial(self._classify, image))

    def model(self) -> ModelVersion | None:
        """Return the model that responds; None if the server does not report it.

        Raises:
            RejectedError: see `classify`.
            UnavailableError: see `classify`.
        """
        try:
            return self._retry(self._post).model
        except RejectedError as error:
            # The request has no image; the headers of the rejection name the model.
            if error.model is None and error.type not in {"MissingImage", "EmptyImage"}:
                raise
            return error.model

    def _retry(self, request: Callable[[], Classification]) -> Classification:
        handled = sys.exc_info()[1]  # the caller's error, which is not a cause of this one
        patience = self.options.patience
        try:
            for attempt in tries(partial(_retry_after, patience), patience):
                with attempt:
                    return request()
        except (requests.RequestException, _TransientStatusError, UnicodeError) as error:
            cause = _root_cause(error, handled)
            wrong_scheme = _wrong_scheme(self.url, cause)
            message = (
                f"{self.url} gave no answer: {wrong_scheme or str(cause) or type(cause).__name__}"
            )
            is_response = isinstance(error, _TransientStatusError)
            is_permanent = not is_response and not _retry_after(patience, error)
            raise UnavailableError(
                message, is_permanent=is_permanent or wrong_scheme is not None
            ) from error
        raise AssertionError  # the last attempt returns or raises

    def _classify(self, image: Path | bytes) -> Classification:
        if isinstance(image, bytes):
            return self._send(image, len(image))
        content, status = read(image, _MAX_BYTES)
        try:
            return self._send(content, status.st_size)
        except RejectedError:
            check_unchanged(image, status)
            raise

    def _send(self, content: bytes, size: int) -> Classification:
        if size > _MAX_BYTES:
            raise RejectedError(413, "TooLarge", f"The image has {size / 1e6:.1f} MB.")
        if not size:
            raise RejectedError(400, "EmptyImage", "The image is empty: it has no bytes.")
        # The server does not need the file's name.
        file = ("image", content, "application/octet-stream")
        try:
            return self._post(files={"file": file}, data=self._fields)
        except requests.ConnectionError as error:
            lost = any(isinstance(cause, ProtocolError) for cause in error.args)
            if size <= MAX_IMAGE_BYTES or not lost:
                raise
            message = (
                f"The image has {size / 1e6:.1f} MB, and the server closed the connection, as it "
                "does if that is more than it accepts; 20 MB unless it is configured otherwise."
            )
            raise RejectedError(413, "TooLarge", message) from error

    def _post(self, **body: Any) -> Classification:
        body |= {"timeout": self.options.timeout, "proxies": self._proxies}
        return _parse(self._session.post(self.url, **body, allow_redirects=False))


def check_address(url: str) -> str:
    """Return the address if it is a valid URL; raise `ValueError` with a message otherwise."""
    with suppress(ValueError):  # the base class of the errors of requests
        requests.Request("POST", url).prepare()
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        if parts.scheme in {"http", "https"}:
            return url
    like = "http://127.0.0.1:8080/predictions/densenet121"
    raise ValueError(f"{url!r} must be a whole address, such as {like}.")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _TransientStatusError(Exception):
    """A response after which to retry, `after` seconds if it has a Retry-After header."""

    def __init__(self, response: requests.Response, message: str) -> None:
        super().__init__(f"status {response.status_code} {message}".strip())
        self.after = 0.0
        with suppress(InvalidHeader):
            self.after = Retry().parse_retry_after(response.headers.get("Retry-After", "0"))


def _retry_after(patience: float, error: Exception) -> bool | float:
    """Return whether to retry, or the seconds to wait before the retry."""
    if isinstance(error, _TransientStatusError):
        return error.after <= patience and (error.after or True)
    if isinstance(error, TransientError):
        return error.errno != errno.ENOENT  # a missing folder is left to a later run
    if isinstance(error, requests.exceptions.SSLError):  # a bad certificate, or a port without TLS
        return False
    if isinstance(error, requests.ConnectionError):
        reason = getattr(error.args[0] if error.args else None, "reason", None)
        # The host that cannot be resolved may be the proxy.
        return not isinstance(getattr(reason, "original_error", reason), NameResolutionError)
    return isinstance(error, (requests.Timeout, requests.exceptions.ChunkedEncodingError))


def _root_cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the first error of the chain, whose message has no texts that each library adds."""
    cause: BaseException | None = error
    while cause is not None and cause is not handled:
        error, cause = cause, cause.__cause__ or cause.__context__
    return error


def _wrong_scheme(url: str, cause: BaseException) -> str | None:
    """Return a message if the URL has http:// for a port with TLS, or https:// for one without."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        is_plain = getattr(cause, "reason", None) in _NOT_TLS
        return (
            "The port does not expect TLS: use http:// instead of https://." if is_plain else None
        )
    if isinstance(cause, (ConnectionResetError, http.client.HTTPException)):
        with suppress(OSError):
            address = (parts.hostname or "", parts.port or 80)
            ssl.get_server_certificate(address, timeout=_PROBE_SECONDS)
            return _EXPECTS_TLS
    return None


def _parse(response: requests.Response) -> Classification:
    """Parse a response; raise `_TransientStatusError` or `RejectedError` if it is an error."""
    try:
        body = response.json()
    except ValueError:
        body = None
    answer: Mapping[str, Any] = body if isinstance(body, dict) else {}
    message, status = str(answer.get("message", "")), response.status_code
    if status in _TRANSIENT_STATUSES or _LOST_WORKER in message:
        raise _TransientStatusError(response, message)
    name, version = (response.headers.get(f"x-model-{what}") for what in ("name", "version"))
    multilabel = response.headers.get("x-model-activation") == "sigmoid"
    model = ModelVersion(name, version, multilabel) if name and version else None
    if not response.ok or response.is_redirect:
        if not message:
            message = f"The server answered with status {status}."
            if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                message = "The image is larger than the server accepts."
            elif _NGINX_EXPECTS_TLS in response.text:
                message = _EXPECTS_TLS
        raise RejectedError(status, str(answer.get("type", "HTTPError")), message, model)
    try:
        return Classification.from_response(answer, model)
    except ValueError as error:
        message = "What answers there is no image classification service."
        raise RejectedError(status, "NotThisService", message) from error
