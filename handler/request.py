"""Requests, images and responses, which all stages share, and the isolation of errors.

Each stage sets the attributes that it computes. An error is stored on the request or image that it
concerns, and later stages skip that one.
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
    """The purpose of a request."""

    CLASSIFY = enum.auto()
    EXPLAIN = enum.auto()
    WEB_UI = enum.auto()
    DESCRIBE = enum.auto()


@dataclass(frozen=True)
class Options:
    """The options of a request.

    Attributes:
        topk: number of predictions, 1 or more; all classes if it is larger than their number.
        threshold: confidence threshold, 0 to 1, from which a class counts as recognized; for a
            multi-label model one for all classes or one per class.
        class_index: position of the class to explain, as text from the client.
        class_id: id of the class to explain, such as "n02124075".
        class_name: name of the class to explain, such as "tabby".
        embedding: include the embedding in each result.
    """

    topk: int
    threshold: Threshold
    class_index: str | None = None
    class_id: str | None = None
    class_name: str | None = None
    embedding: bool = False


@dataclass
class RequestImage:
    """One image of a request, with what each stage computes from it.

    Attributes:
        request_id: TorchServe's id of the request.
        name: the name under which the client sent it.
        data: the encoded image.
        error: the first error, if any; later stages skip the image.
        decoded: the model's input with its position in the image.
        extra: the model output that the image needs in addition to the probabilities.
        probabilities: float32 (classes,); they sum to 1 unless the model is multi-label.
        extra_output: float32; this image's part of the output `extra`.
        result: the image's JSON object in the response.
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
    """The response to one request; header values are in ASCII."""

    status: int
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(body: Body | Sequence[Body], status: int = HTTPStatus.OK) -> Response:
    """Encode a JSON body; raise `ValueError` for NaN or infinity, which JSON does not support."""
    text = json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n"
    return Response(status, text.encode("utf-8"), "application/json")


@dataclass
class Request:
    """One request, from its parts to its response.

    Attributes:
        request_id: TorchServe's id of the request.
        row: part name to value. A raw body is the part `body`.
        headers: the request's headers; TorchServe adds the headers of each part as a mapping under
            the part's name.
        options: the options of the whole request; the defaults until they are parsed.
        purpose: the purpose of the request.
        protocol: parses the request and formats the response.
        images: the images in the order in which they were sent; not empty for classification and
            explanation.
        class_index: the class to explain; None for each image's most probable class.
        heat_map: explain with a heat map instead of numbers; the request then has one image.
        error: an error of the whole request, if any.
        response: the response, once it is known.
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
        """Return the output that the images need in addition to the probabilities, if any."""
        if self.purpose is Purpose.EXPLAIN:
            return Extra.FEATURES
        in_tensor = self.protocol is not None and self.protocol.needs_embedding
        return Extra.EMBEDDING if self.options.embedding or in_tensor else None

    def header(self, name: str) -> str:
        """Return a header by its name in lower case; empty if the request does not have it."""
        return self._headers.get(name, "")

    @cached_property
    def _headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in self.headers.items():
            if isinstance(value, str):  # a mapping holds the headers of a part
                found.setdefault(name.lower(), value.strip())
        return found


class Protocol(abc.ABC):
    """A format of request and response bodies, with one instance per request.

    Attributes:
        needs_embedding: the response contains embeddings outside the results.
    """

    needs_embedding = False

    @abc.abstractmethod
    def parse(self, request: Request, body: "JsonBody | None", archive: "Archive") -> None:
        """Set the request's options and images; `body` is None if it is not JSON.

        Raises:
            ClientError: the body is malformed, or an option has an invalid value. An error that
                concerns one of several images is stored on that image.
        """

    @abc.abstractmethod
    def format(self, request: Request, archive: "Archive") -> Response:
        """Return the response to a request whose images have results or errors."""


# --- Isolation of errors ---


class _Fallible(typing.Protocol):
    request_id: str
    error: RequestError | None


_T = TypeVar("_T", bound=_Fallible)


def run_isolated(item: _T, stage: Callable[[_T], None]) -> None:
    """Run a stage on one request or image, unless it has an error; store an exception as one."""
    if item.error is not None:
        return
    try:
        stage(item)
    except RequestError as error:
        item.error = error.without_traceback()
    except Exception as error:  # includes RecursionError and MemoryError
        logger.exception("Failed on request %s", item.request_id)
        item.error = InternalError(item.request_id, detail=f"{type(error).__name__}: {error}")
