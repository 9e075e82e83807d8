"""A client for the service, for programs: one picture at a time, or many at once.

    from scripts.client import Client

    with Client("http://127.0.0.1:8080/predictions/densenet121") as client:
        print(client.classify(Path("cat.jpg")).label)

`AsyncClient` is the same with `async with` and `await`. Both ask again where the server is full,
restarts or loses the connection, which is safe: a classification changes nothing.
"""

import asyncio
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx2
import stamina
from typing_extensions import Self

from scripts.reading import PassingError, Snapshot, check_unchanged, in_thread, read

_Result = TypeVar("_Result")

# The server's queue is full, its worker was lost with the request, or the network was too slow for
# a gateway: another try may do.
_BUSY = {408, 429, 502, 503, 504, 507}
_LOST_WORKER = "Worker died"

# Seconds.
PATIENCE = 120.0
TIMEOUT = 60.0
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0

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
    """

    name: str
    version: str

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
        recognized: whether the best one reaches the threshold.
        warning: what must be known about the model, such as that it is untrained.
        model: which one it was; None where the server does not say.
    """

    predictions: tuple[Prediction, ...]
    recognized: bool
    warning: str | None = None
    model: ModelVersion | None = None

    @property
    def label(self) -> str:
        """The best class's name, recognised or not."""
        return self.predictions[0].label

    @property
    def probability(self) -> float:
        """The best class's probability, 0 to 1."""
        return self.predictions[0].probability

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
        return cls(predictions, recognized, None if warning is None else str(warning), model)


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
    def load(picture: Path | bytes) -> Snapshot:
        """The bytes to send, with what tells whether the file has changed since.

        Raises:
            RefusedError: there are none, or more of them than the service accepts.
            PassingError: the file cannot be read now.
            OSError: the file can never be read as it is.
        """
        loaded = (
            read(picture, MAX_PICTURE_BYTES)
            if isinstance(picture, Path)
            else Snapshot(picture, len(picture), 0)
        )
        if loaded.size > MAX_PICTURE_BYTES:
            size = f"{loaded.size / 1e6:.1f} MB"
            raise RefusedError(
                413, "TooLarge", f"The picture has {size}, more than the 20 accepted."
            )
        if not loaded.size:
            raise RefusedError(400, "EmptyImage", "The picture is empty: it has no bytes.")
        return loaded

    def request(self, content: bytes | None) -> dict[str, Any]:
        """The arguments of an HTTP client's `post` to classify a picture."""
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
    """A full server, a restart, a lost connection or drive; not a wrong address or certificate."""
    if isinstance(error, (_BusyError, PassingError)):
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
            PassingError: the file could not be read within the patience.
            OSError: the file can never be read as it is.
        """
        try:
            loaded: Snapshot | None = None
            for attempt in self.asking.retries():
                with attempt:
                    if loaded is None:
                        loaded = self.asking.load(picture)
                    request = self.asking.request(loaded.content)
                    try:
                        return _read(self._http.post(self.url, **request))
                    except RefusedError:
                        refused, loaded = loaded, None
                        if isinstance(picture, Path):
                            check_unchanged(picture, refused)
                        raise
        except (httpx2.RequestError, httpx2.InvalidURL, _BusyError) as error:
            raise _unavailable(self.url, error) from error
        raise AssertionError  # the last try returns or raises

    def model(self) -> ModelVersion | None:
        """Which model answers there; None where the server does not say.

        Raises:
            RefusedError: the server will not, for a reason that it gives.
            UnavailableError: it did not answer within the patience.
        """
        try:
            for attempt in self.asking.retries():
                with attempt:
                    # There is no picture in it: the refusal says which model it is from.
                    return _read(self._http.post(self.url)).model
        except RefusedError as error:
            return _who_refused(error)
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
        try:
            loaded: Snapshot | None = None
            async for attempt in self.asking.retries():
                with attempt:
                    if loaded is None:
                        loaded = await self._in_time(partial(self.asking.load, picture))
                    request = self.asking.request(loaded.content)
                    try:
                        return _read(await self._http.post(self.url, **request))
                    except RefusedError:
                        refused, loaded = loaded, None
                        if isinstance(picture, Path):
                            await self._in_time(partial(check_unchanged, picture, refused))
                        raise
        except (httpx2.RequestError, httpx2.InvalidURL, _BusyError) as error:
            raise _unavailable(self.url, error) from error
        raise AssertionError  # the last try returns or raises

    async def model(self) -> ModelVersion | None:
        """Which model answers there; errors are those of `Client.model`."""
        try:
            async for attempt in self.asking.retries():
                with attempt:
                    return _read(await self._http.post(self.url)).model
        except RefusedError as error:
            return _who_refused(error)
        except (httpx2.RequestError, httpx2.InvalidURL, _BusyError) as error:
            raise _unavailable(self.url, error) from error
        raise AssertionError  # the last try returns or raises

    async def _in_time(self, work: Callable[[], _Result]) -> _Result:
        """Awaits what is done with a file; a drive that does not answer is one that is away."""
        try:
            return await in_thread(work, self.asking.timeout)
        except asyncio.TimeoutError as error:
            raise PassingError(errno.ETIMEDOUT, "the drive does not answer") from error


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
    model = _model(response.headers)
    if response.is_success:
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
    return ModelVersion(name, version) if name and version else None


def _who_refused(error: RefusedError) -> ModelVersion | None:
    """The model that was asked without a picture; raises what it is not the model that says."""
    if error.model is None and error.type not in {"MissingImage", "EmptyImage"}:
        raise error
    return error.model


def _unavailable(url: str, error: Exception) -> UnavailableError:
    reason = str(error) or type(error).__name__
    return UnavailableError(f"{url} gave no answer, however often it was asked: {reason}")


def check_address(url: str) -> str:
    """The address as it is, if pictures could go there; `ValueError` with a sentence otherwise."""
    like = "such as http://127.0.0.1:8080/predictions/densenet121"
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{url!r} is no address, {like}: {error}.") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError(f"{url!r} must be a whole address with http:// or https://, {like}.")
    return url
