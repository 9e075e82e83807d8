"""Requests, images and responses, as the stages share them, and how an error stays in its place.

Each stage fills in what it computes. An error is stored on the request or image that it concerns,
and the later stages leave that one out.
"""

import abc
import enum
import json
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from handler.decoding.pillow import DecodedImage
from handler.errors import InternalError, RequestError
from handler.inference.activation import Threshold
from handler.inference.engines import Extra

if TYPE_CHECKING:
    from handler.archive import Archive
    from handler.protocols.json_body import JsonBody

logger = logging.getLogger(__name__)

Body = dict[str, Any]


class Purpose(enum.Enum):
    """What a request wants."""

    CLASSIFY = enum.auto()
    EXPLAIN = enum.auto()
    WEB_UI = enum.auto()
    DESCRIBE = enum.auto()


@dataclass(frozen=True)
class Options:
    """What a request may choose.

    Attributes:
        topk: number of predictions, 1 or more; a number above that of the classes gives all.
        threshold: confidence threshold, 0 to 1, from which a class counts as recognized; of a
            multi-label model one for all classes or one for each.
        class_index: position of the class to explain, as the client wrote it.
        class_id: id of the class to explain, such as "n02124075".
        class_name: name of the class to explain, such as "tabby".
        embedding: each result holds the embedding.
    """

    topk: int
    threshold: Threshold
    class_index: str | None = None
    class_id: str | None = None
    class_name: str | None = None
    embedding: bool = False


@dataclass
class RequestImage:
    """One image of a request, from its part of the request to its result.

    Attributes:
        request_id: TorchServe's id of the request.
        name: under which the client sent it.
        data: encoded, as it was sent.
        error: what is wrong with it.
        decoded: the model's input, and the model's view of the image.
        extra: the output that it needs in addition to the probabilities.
        probabilities: float32 (classes,); they sum to 1 unless the model is multi-label.
        extra_output: float32; `extra` of this image.
        result: as in the response.
    """

    request_id: str
    name: str
    data: bytes | bytearray = b""
    error: RequestError | None = None
    decoded: DecodedImage | None = None
    extra: Extra | None = None
    probabilities: NDArray[np.float32] | None = None
    extra_output: NDArray[np.float32] | None = None
    result: Body | None = None


@dataclass(frozen=True)
class Response:
    """The response to one request.

    Attributes:
        status: HTTP status code.
        body: the encoded body.
        content_type: its media type.
        headers: further response headers; ASCII.
    """

    status: int
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(body: Body | Sequence[Body], status: int = HTTPStatus.OK) -> Response:
    """Encode a JSON body.

    Raises:
        ValueError: the body holds NaN or infinity, which JSON does not have.
    """
    text = json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n"
    return Response(status, text.encode("utf-8"), "application/json")


@dataclass
class Request:
    """One request, from its parts to its response.

    Attributes:
        request_id: TorchServe's id of it.
        row: part name to value. A raw body is the part `body`.
        headers: the request's headers; TorchServe adds the headers of each part as a mapping under
            the part's name.
        options: of the whole request; the defaults until they are parsed.
        purpose: what it wants.
        protocol: which parsed the request and formats the response.
        images: in the order in which they were sent; at least one to classify or explain.
        class_index: the class to explain; None for each image's best one.
        heat_map: explain with a heat map instead of numbers; then there is one image.
        error: what is wrong with it as a whole.
        response: its response.
    """

    request_id: str
    row: Mapping[str, Any]
    headers: Mapping[str, Any]
    options: Options
    purpose: Purpose = Purpose.CLASSIFY
    protocol: "Protocol | None" = None
    images: list[RequestImage] = field(default_factory=list)
    class_index: int | None = None
    heat_map: bool = False
    error: RequestError | None = None
    response: Response | None = None

    @property
    def extra(self) -> Extra | None:
        """The output that its images need in addition to the probabilities."""
        if self.purpose is Purpose.EXPLAIN:
            return Extra.FEATURES
        in_tensor = self.protocol is not None and self.protocol.needs_embedding
        return Extra.EMBEDDING if self.options.embedding or in_tensor else None

    def header(self, name: str) -> str:
        """Return a header of the request by its name in lower case; empty if there is none."""
        return self._headers.get(name, "")

    @cached_property
    def _headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in self.headers.items():
            if isinstance(value, str):  # not the headers of a part
                found.setdefault(name.lower(), value.strip())
        return found


class Protocol(abc.ABC):
    """A form of request and response bodies. Each request has an object of its own.

    Attributes:
        needs_embedding: the response holds embeddings apart from the results.
    """

    needs_embedding = False

    @classmethod
    @abc.abstractmethod
    def accepts(cls, request: Request, body: "JsonBody | None") -> bool:
        """Return whether a request is of this protocol; `body` is None if it is not JSON."""

    @abc.abstractmethod
    def parse(self, request: Request, body: "JsonBody | None", archive: "Archive") -> None:
        """Fill in the request's options and images.

        Raises:
            ClientError: the body is malformed, or an option has an invalid value. An error that
                concerns one of several images is stored on that image.
        """

    @abc.abstractmethod
    def format(self, request: Request, archive: "Archive") -> Response:
        """Return the response to a request whose images have results or errors."""


# --- How an error stays in its place ---


class _Fallible(typing.Protocol):
    request_id: str
    error: RequestError | None


_T = TypeVar("_T", bound=_Fallible)


def run_isolated(item: _T, stage: Callable[[_T], None]) -> None:
    """Run a stage on one request or image and store what it raises as that one's error.

    Does nothing if the item has an error already.
    """
    if item.error is not None:
        return
    try:
        stage(item)
    except RequestError as error:
        item.error = error.without_traceback()
    except Exception as error:  # RecursionError and MemoryError too
        logger.exception("Failed on request %s", item.request_id)
        item.error = InternalError(item.request_id, detail=f"{type(error).__name__}: {error}")


def run_batch(items: Sequence[_T], stage: Callable[[Sequence[_T]], None]) -> None:
    """Run a stage on several items together; if it raises, run it on each alone.

    Items that have an error already are left out.
    """
    sound = [item for item in items if item.error is None]
    if not sound:
        return
    try:
        stage(sound)
    except Exception:
        logger.warning("Failed on a batch of %d; now one by one", len(sound), exc_info=True)
        for item in sound:
            run_isolated(item, lambda alone: stage([alone]))
