"""A client for the service, for programs: one picture at a time, or many at once.

    from scripts.client import Client

    with Client("http://127.0.0.1:8080/predictions/densenet121") as client:
        print(client.classify(Path("cat.jpg")).label)

`AsyncClient` is the same with `async with` and `await`. Both ask again where the server is full,
restarts or loses the connection, which is safe: a classification changes nothing.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import stamina
from typing_extensions import Self

# The server's queue is full, or its worker was lost with the request: another try may do.
_BUSY = {429, 502, 503, 504, 507}
_LOST_WORKER = "Worker died"

# Seconds.
PATIENCE = 120.0
TIMEOUT = 60.0
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0

# The service's bound for a request; the form around a picture needs a little of it.
MAX_PICTURE_BYTES = 20_971_520 - 4096

# What is wrong with a picture, and not with how it was asked about.
_PICTURE_ERRORS = {
    "NotAnImage",
    "DamagedImage",
    "EmptyImage",
    "UnsupportedFormat",
    "TooLarge",
}


class ServiceError(Exception):
    """Something kept a picture from being classified; `str(error)` says what."""


class RefusedError(ServiceError):
    """The server's answer is that it will not: asking again would not help.

    Attributes:
        code: the HTTP status.
        type: the server's name for what is wrong, such as "NotAnImage".
        message: in words.
    """

    def __init__(self, code: int, type_: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.type = type_
        self.message = message

    @property
    def is_about_the_picture(self) -> bool:
        """Whether another picture could fare better."""
        return self.type in _PICTURE_ERRORS


class UnavailableError(ServiceError):
    """The server gave no answer for as long as the client was told to be patient."""


class _BusyError(Exception):
    """Ask again."""


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
        recognized: whether the best one reaches the threshold.
        warning: what must be known about the model, such as that it is untrained.
    """

    predictions: tuple[Prediction, ...]
    recognized: bool
    warning: str | None = None

    @property
    def label(self) -> str:
        """The best class's name, recognised or not."""
        return self.predictions[0].label

    @property
    def probability(self) -> float:
        """The best class's probability, 0 to 1."""
        return self.predictions[0].probability

    @classmethod
    def from_answer(cls, body: Mapping[str, Any]) -> "Classification":
        """Takes the server's answer to one picture; `ValueError` where it is something else."""
        match body:
            case {"predictions": [_, *_] as rows, "recognized": bool() as recognized}:
                predictions = tuple(_prediction(row) for row in rows)
            case _:
                raise ValueError("no predictions")
        warning = body.get("warning")
        return cls(predictions, recognized, None if warning is None else str(warning))


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
class Asking:
    """How to ask.

    Attributes:
        topk: predictions wanted; None for as many as the server gives.
        threshold: least probability, 0 to 1, that counts as recognised; None for the server's.
        patience: seconds for which one picture is tried again and again.
        timeout: seconds that one try may take.
        key: a client's key, where a gateway asks for one.
    """

    topk: int | None = None
    threshold: float | None = None
    patience: float = PATIENCE
    timeout: float = TIMEOUT
    key: str | None = None

    @staticmethod
    def content(picture: Path | bytes) -> bytes:
        """The bytes to send.

        Raises:
            RefusedError: there are more of them than the service accepts.
            OSError: the file cannot be read.
        """
        size = len(picture) if isinstance(picture, bytes) else picture.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise RefusedError(
                413, "TooLarge", f"The picture has {size / 1e6:.1f} MB, more than the 20 accepted."
            )
        return picture if isinstance(picture, bytes) else picture.read_bytes()

    def request(self, content: bytes) -> dict[str, Any]:
        """The arguments of an HTTP client's `post`."""
        said = {"topk": self.topk, "threshold": self.threshold}
        return {
            # The name stays here: nobody needs it.
            "files": {"file": ("picture", content, "application/octet-stream")},
            "data": {name: str(value) for name, value in said.items() if value is not None},
        }

    def options(self) -> dict[str, Any]:
        """The arguments that make an HTTP client."""
        headers = {} if self.key is None else {"X-API-Key": self.key}
        return {"timeout": self.timeout, "headers": headers}

    def retries(self) -> Any:
        """An iterable of tries, with growing and random pauses between them."""
        return stamina.retry_context(
            on=_is_worth_another_try,
            attempts=None,
            timeout=self.patience,
            wait_initial=_FIRST_WAIT,
            wait_max=_LONGEST_WAIT,
            wait_jitter=_FIRST_WAIT,
        )


def _is_worth_another_try(error: Exception) -> bool:
    """A full server, a restart, a lost connection; not a wrong address or certificate."""
    if isinstance(error, _BusyError):
        return True
    hopeless = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)
    return (
        isinstance(error, httpx2.TransportError)
        and not isinstance(error, hopeless)
        and "CERTIFICATE_VERIFY_FAILED" not in str(error)
    )


class Client:
    """Classifies pictures; several threads may share one."""

    def __init__(self, url: str, asking: Asking | None = None) -> None:
        """Connects when it is first used.

        Args:
            url: where pictures go, such as "http://127.0.0.1:8080/predictions/densenet121".
            asking: how to ask.
        """
        self.url = url
        self.asking = asking or Asking()
        self._http = httpx2.Client(**self.asking.options())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def classify(self, picture: Path | bytes) -> Classification:
        """Classifies one picture.

        Args:
            picture: a file, or its bytes.

        Raises:
            RefusedError: the server will not, for a reason that it gives.
            UnavailableError: it did not answer within the patience.
            OSError: the file cannot be read.
        """
        request = self.asking.request(self.asking.content(picture))
        try:
            for attempt in self.asking.retries():
                with attempt:
                    return _read(self._http.post(self.url, **request))
        except (httpx2.RequestError, httpx2.InvalidURL, _BusyError) as error:
            raise _unavailable(self.url, error) from error
        raise AssertionError  # the last try returns or raises


class AsyncClient:
    """Classifies pictures, many at once in one thread."""

    def __init__(self, url: str, asking: Asking | None = None, connections: int = 16) -> None:
        """Connects when it is first used.

        Args:
            url: where pictures go, such as "http://127.0.0.1:8080/predictions/densenet121".
            asking: how to ask.
            connections: most requests at the same time; others wait for their turn.
        """
        self.url = url
        self.asking = asking or Asking()
        # Waiting for one's turn is not part of a request's time.
        timeout = httpx2.Timeout(self.asking.timeout, pool=None)
        self._http = httpx2.AsyncClient(
            **{**self.asking.options(), "timeout": timeout},
            limits=httpx2.Limits(max_connections=connections),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connections."""
        await self._http.aclose()

    async def classify(self, picture: Path | bytes) -> Classification:
        """Classifies one picture; arguments and errors are those of `Client.classify`."""
        content = await asyncio.to_thread(self.asking.content, picture)
        request = self.asking.request(content)
        try:
            async for attempt in self.asking.retries():
                with attempt:
                    return _read(await self._http.post(self.url, **request))
        except (httpx2.RequestError, httpx2.InvalidURL, _BusyError) as error:
            raise _unavailable(self.url, error) from error
        raise AssertionError  # the last try returns or raises


def _read(response: httpx2.Response) -> Classification:
    """The answer; raises `_BusyError` where it is worth asking again, else `RefusedError`."""
    try:
        body = response.json()
    except ValueError:
        body = None
    answer: Mapping[str, Any] = body if isinstance(body, dict) else {}
    message = str(answer.get("message", ""))
    if response.status_code in _BUSY or _LOST_WORKER in message:
        raise _BusyError(f"status {response.status_code} {message}".strip())
    if response.is_success:
        try:
            return Classification.from_answer(answer)
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
    )


def _unavailable(url: str, error: Exception) -> UnavailableError:
    reason = str(error) or type(error).__name__
    return UnavailableError(f"{url} gave no answer, however often it was asked: {reason}")
