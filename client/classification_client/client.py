"""A client for the service: classifies pictures, and asks again where that is worth it.

It asks again where the server is full, restarts or loses the connection, which is safe: a
classification changes nothing.
"""

import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from classification_client.reading import PassingError, Snapshot, check_unchanged, in_thread, read
from classification_client.retrying import tries

_SUCCESS = range(200, 300)

# The server's queue is full, its worker was lost with the request, or the network was too slow for
# a gateway: another try may do.
_BUSY = {408, 429, 502, 503, 504, 507}
_LOST_WORKER = "Worker died"

# Seconds.
PATIENCE = 120.0
TIMEOUT = 60.0

# The service's bound for a request; the form around a picture needs a little of it.
MAX_PICTURE_BYTES = 20_971_520 - 4096

# Statuses that speak of what was sent, and what they say of how it was asked, not of a picture.
# The last two have no error of this service in them, so that they may come from anybody.
_ABOUT_THE_BODY = {400, 413, 415}
_ABOUT_THE_QUESTION = {
    "BadRequest",
    "MissingImage",
    "RepeatedPart",
    "TooManyImages",
    "BadRequestException",
    "HTTPError",
    "NotThisService",
}

# What tells which model answered.
_NAME_HEADER, _VERSION_HEADER = "x-model-name", "x-model-version"
# Only of a model that gives several labels, and what it says then.
_ACTIVATION_HEADER, _EACH_FOR_ITSELF = "x-model-activation", "sigmoid"


class ServiceError(Exception):
    """Something kept a picture from being classified; `str(error)` says what."""


class RefusedError(ServiceError):
    """The server's answer is that it will not: asking again would not help.

    Attributes:
        code: the HTTP status.
        type: the server's name for what is wrong, such as "NotAnImage".
        message: in words.
        model: which model said so, where one did.
    """

    def __init__(
        self, code: int, type_: str, message: str, model: "ModelVersion | None" = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.type = type_
        self.message = message
        self.model = model

    @property
    def is_about_the_picture(self) -> bool:
        """Whether another picture could fare better."""
        return self.code in _ABOUT_THE_BODY and self.type not in _ABOUT_THE_QUESTION


class UnavailableError(ServiceError):
    """The server gave no answer for as long as the client was told to be patient."""


class UnreadableError(ServiceError):
    """No picture can be read any more, as where a network drive is gone."""


class _BusyError(Exception):
    """Ask again."""


@dataclass(frozen=True)
class ModelVersion:
    """Which model answered.

    Attributes:
        name: under which it is served.
        version: of its archive; the digits at its end change with all that was packed.
        multilabel: whether it gives several labels a picture.
    """

    name: str
    version: str
    multilabel: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class Prediction:
    """One class and how probable it is.

    Attributes:
        label: the class's name.
        probability: 0 to 1.
        class_id: the class's id, such as "n02124075".
        class_index: its position in the model's logits.
    """

    label: str
    probability: float
    class_id: str
    class_index: int


@dataclass(frozen=True)
class Classification:
    """What the server says of one picture.

    Attributes:
        predictions: best first, as many as were asked for.
        recognized: whether the best one reaches the threshold; of a model that gives several
            labels, whether any class reaches its own.
        warning: what must be known about the model, such as that it is untrained.
        model: which one it was; None where the server does not say.
        labels: all classes that reach their threshold, best first, of a model that gives several
            labels a picture; None of any other.
        embedding: the pooled last features, where they were asked for.
    """

    predictions: tuple[Prediction, ...]
    recognized: bool
    warning: str | None = None
    model: ModelVersion | None = None
    labels: tuple[Prediction, ...] | None = None
    embedding: Sequence[float] | None = None

    @property
    def best(self) -> Prediction:
        """The best label; without one the best class, recognised or not."""
        return (self.labels or self.predictions)[0]

    @property
    def label(self) -> str:
        """The best class's name, recognised or not."""
        return self.best.label

    @property
    def probability(self) -> float:
        """The best class's probability, 0 to 1."""
        return self.best.probability

    @classmethod
    def from_answer(
        cls, body: Mapping[str, Any], model: ModelVersion | None = None
    ) -> "Classification":
        """Takes the server's answer to one picture; `ValueError` where it is something else."""
        match body:
            case {"predictions": [_, *_] as rows, "recognized": bool() as recognized}:
                predictions = tuple(_prediction(row) for row in rows)
            case _:
                raise ValueError("no predictions")
        warning = body.get("warning")
        return cls(
            predictions,
            recognized,
            None if warning is None else str(warning),
            model,
            _labels(body.get("labels")),
            _embedding(body),
        )


def _labels(rows: object) -> tuple[Prediction, ...] | None:
    if rows is None:
        return None
    if not isinstance(rows, list):
        raise ValueError("no labels")  # noqa: TRY004  # as of any other answer
    return tuple(_prediction(row) for row in rows)


def _embedding(body: Mapping[str, Any]) -> Sequence[float] | None:
    match body.get("embedding"):
        case None:
            return None
        case [_, *_] as values if all(isinstance(value, (int, float)) for value in values):
            return array("f", values)  # a tenth of a tuple's memory
        case _:
            raise ValueError("no embedding")


def _prediction(row: object) -> Prediction:
    match row:
        case {
            "label": str() as label,
            "probability": int() | float() as probability,
            "class_id": str() as class_id,
            "class_index": int() as class_index,
        }:
            return Prediction(label, float(probability), class_id, class_index)
        case _:
            raise ValueError("no prediction")


@dataclass(frozen=True)
class RequestOptions:
    """How to ask.

    Attributes:
        topk: predictions wanted; None for as many as the server gives.
        threshold: least probability, 0 to 1, that counts as recognised; None for the server's,
            which may be another for each class.
        embedding: ask for the pooled last features too.
        patience: seconds for which one picture is tried again and again; 0 for one try.
        timeout: seconds that one try may take.
        key: a client's key, where a gateway asks for one.
        headers: more headers of HTTP, such as a token's.
    """

    topk: int | None = None
    threshold: float | None = None
    patience: float = PATIENCE
    timeout: float = TIMEOUT
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    embedding: bool = False

    @property
    def fields(self) -> dict[str, str]:
        """The form's fields beside the picture."""
        embedding = "true" if self.embedding else None
        given = {"topk": self.topk, "threshold": self.threshold, "embedding": embedding}
        return {name: str(value) for name, value in given.items() if value is not None}

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers with the key among them."""
        return {**self.headers, **({} if self.key is None else {"X-API-Key": self.key})}


class Client:
    """Classifies pictures; several threads may share one."""

    def __init__(
        self, url: str, options: RequestOptions | None = None, connections: int = 16
    ) -> None:
        """Connects when it is first used.

        Args:
            url: where pictures go, such as "http://127.0.0.1:8080/predictions/densenet121".
            options: how to ask.
            connections: how many stay open, for as many threads.
        """
        self.url = url
        self.options = options or RequestOptions()
        self._session = requests.Session()
        self._session.headers.update(self.options.all_headers)
        self._session.auth = lambda request: request  # none of .netrc, which would replace a token
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def __enter__(self) -> "Client":  # noqa: PYI034  # Self is younger than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._session.close()

    def classify(self, picture: Path | bytes) -> Classification:
        """Classifies one picture.

        Args:
            picture: a file, or its bytes.

        Raises:
            RefusedError: the server will not, for a reason that it gives.
            UnavailableError: it did not answer within the patience.
            PassingError: the file could not be read within the patience.
            OSError: the file can never be read as it is.
        """
        loaded: Snapshot | None = None
        with self._answering():
            for attempt in tries(_is_worth_another_try, self.options.patience):
                with attempt:
                    if loaded is None:
                        loaded = self._load(picture)
                    try:
                        # The name stays here: nobody needs it.
                        file = ("picture", loaded.content, "application/octet-stream")
                        return self._post(files={"file": file}, data=self.options.fields)
                    except RefusedError:
                        refused, loaded = loaded, None
                        if isinstance(picture, Path):
                            check = partial(check_unchanged, picture, refused)
                            in_thread(check, self.options.timeout)
                        raise
        raise AssertionError  # the last try returns or raises

    def model(self) -> ModelVersion | None:
        """Which model answers there; None where the server does not say.

        Raises:
            RefusedError: the server will not, for a reason that it gives.
            UnavailableError: it did not answer within the patience.
        """
        try:
            with self._answering():
                for attempt in tries(_is_worth_another_try, self.options.patience):
                    with attempt:
                        # There is no picture in it: the refusal says which model it is from.
                        return self._post().model
        except RefusedError as error:
            return _who_refused(error)
        raise AssertionError  # the last try returns or raises

    def _load(self, picture: Path | bytes) -> Snapshot:
        """The bytes to send, with what tells whether the file has changed since.

        Raises:
            RefusedError: there are none, or more of them than the service accepts.
            PassingError: the file cannot be read now.
            OSError: the file can never be read as it is.
        """
        if isinstance(picture, Path):
            loaded = in_thread(partial(read, picture, MAX_PICTURE_BYTES), self.options.timeout)
        else:
            loaded = Snapshot(picture, len(picture), 0)
        if loaded.size > MAX_PICTURE_BYTES:
            size = f"{loaded.size / 1e6:.1f} MB"
            raise RefusedError(
                413, "TooLarge", f"The picture has {size}, more than the 20 accepted."
            )
        if not loaded.size:
            raise RefusedError(400, "EmptyImage", "The picture is empty: it has no bytes.")
        return loaded

    def _post(self, **body: Any) -> Classification:
        """Asks once."""
        return _read(
            self._session.post(
                self.url, **body, timeout=self.options.timeout, allow_redirects=False
            )
        )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Says in this module's terms that the last try had no answer."""
        before = sys.exc_info()[1]  # the caller's own, which it may be handling
        try:
            yield
        except (requests.RequestException, _BusyError, UnicodeError) as error:
            raise UnavailableError(
                f"{self.url} gave no answer, however often it was asked: {_reason(error, before)}"
            ) from error


def _is_worth_another_try(error: Exception) -> bool:
    """A full server, a restart, a lost connection or drive; not a wrong address or certificate."""
    if isinstance(error, (_BusyError, PassingError)):
        return True
    lost = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, lost) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _reason(error: BaseException, before: BaseException | None) -> str:
    """What happened in the end, without what each library says of it.

    Args:
        error: the last one.
        before: one that has nothing to do with it.
    """
    cause: BaseException | None = error
    while cause is not None and cause is not before:
        error, cause = cause, cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def _read(response: requests.Response) -> Classification:
    """The answer; raises `_BusyError` where it is worth asking again, else `RefusedError`."""
    try:
        body = response.json()
    except ValueError:
        body = None
    answer: Mapping[str, Any] = body if isinstance(body, dict) else {}
    message = str(answer.get("message", ""))
    if response.status_code in _BUSY or _LOST_WORKER in message:
        raise _BusyError(f"status {response.status_code} {message}".strip())
    model = _model(response.headers)
    if response.status_code in _SUCCESS:
        try:
            return Classification.from_answer(answer, model)
        except ValueError as error:
            raise RefusedError(
                response.status_code,
                "NotThisService",
                "What answers there is no image classification service.",
            ) from error
    raise RefusedError(
        response.status_code,
        str(answer.get("type", "HTTPError")),
        message or f"The server answered with status {response.status_code}.",
        model,
    )


def _model(headers: Mapping[str, str]) -> ModelVersion | None:
    name, version = headers.get(_NAME_HEADER), headers.get(_VERSION_HEADER)
    multilabel = headers.get(_ACTIVATION_HEADER) == _EACH_FOR_ITSELF
    return ModelVersion(name, version, multilabel) if name and version else None


def _who_refused(error: RefusedError) -> ModelVersion | None:
    """The model that was asked without a picture; raises what it is not the model that says."""
    if error.model is None and error.type not in {"MissingImage", "EmptyImage"}:
        raise error
    return error.model


def check_address(url: str) -> str:
    """The address as it is, if pictures could go there; `ValueError` with a sentence otherwise."""
    like = "such as http://127.0.0.1:8080/predictions/densenet121"
    try:
        parsed = urlsplit(url)
        if parsed.scheme in {"http", "https"} and parsed.hostname:
            requests.Request("POST", url).prepare()
            return url
    except ValueError as error:  # what requests raises is one, too
        raise ValueError(f"{url!r} is no address, {like}: {error}.") from error
    raise ValueError(f"{url!r} must be a whole address with http:// or https://, {like}.")
