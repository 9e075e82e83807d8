"""What the stages pass on: a request with its images and its answer, and what keeps a fault there.

Each stage fills in what it makes. What goes wrong with a request or with one of its images stands
beside it as its `error`, and the later stages leave it out.
"""

import enum
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from handler.errors import InternalError, RequestError
from handler.images import Photo, Pixels
from handler.multilabel import Threshold, thresholds
from handler.settings import ModelCard, Settings

logger = logging.getLogger(__name__)

Body = dict[str, Any]


# What embeddings are called in requests and answers.
EMBEDDING = "embedding"


class Purpose(enum.Enum):
    """What a request wants."""

    CLASSIFY = enum.auto()
    EXPLAIN = enum.auto()
    PAGE = enum.auto()
    DESCRIBE = enum.auto()


class Protocol(enum.Enum):
    """What a request speaks, and its answer too."""

    PLAIN = "plain"
    KSERVE_V1 = "KServe V1"
    KSERVE_V2 = "KServe V2"


@dataclass(frozen=True)
class Options:
    """What a request may choose.

    Attributes:
        topk: predictions wanted, 1 or more; more than there are classes gives all classes.
        threshold: least probability, 0 to 1, that counts as recognised; of a model that gives
            several labels, one for all classes or one for each.
        class_index: position of the class to explain, as the client wrote it.
        class_id: id of the class to explain, such as "n02124075".
        embedding: each result holds the pooled last features too.
    """

    topk: int
    threshold: Threshold
    class_index: str | None = None
    class_id: str | None = None
    embedding: bool = False

    @classmethod
    def defaults(cls, settings: Settings, card: ModelCard) -> "Options":
        """The options of a request that chooses nothing."""
        threshold = thresholds(card) if card.multilabel else settings.threshold
        return cls(topk=settings.topk, threshold=threshold)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that a KServe V2 request wants back: as JSON, or in binary behind it."""

    name: str
    binary: bool = False


@dataclass
class RequestImage:
    """One image of a request, from its part of the request to its result.

    Attributes:
        request_id: TorchServe's id of the request.
        name: under which the client sent it.
        data: encoded, as it was sent.
        error: what is wrong with it.
        pixels: uint8 (3, crop, crop), the model's input.
        photo: what an explanation needs to know of the picture.
        probabilities: float32 (classes,); they sum to 1 unless the model gives several labels.
        features: float32 (channels, height, width), the last ones, of an image to explain.
        embedding: float32 (channels,), the pooled last features, where they are asked for.
        result: as it stands in the answer.
    """

    request_id: str
    name: str
    data: bytes | bytearray = b""
    error: RequestError | None = None
    pixels: Pixels | None = None
    photo: Photo | None = None
    probabilities: NDArray[np.float32] | None = None
    features: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None
    result: Body | None = None


@dataclass(frozen=True)
class Response:
    """What one request is answered.

    Attributes:
        status: HTTP status code.
        body: the encoded body.
        content_type: its media type.
        headers: response headers beside that one; ASCII.
    """

    status: int
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request, from TorchServe's row to its answer.

    Attributes:
        request_id: TorchServe's id of it.
        row: part name to value, as TorchServe delivers it.
        headers: the request's headers; TorchServe mixes each part's own into them, as a mapping
            under the part's name.
        options: of the whole request; the defaults until others are read.
        multilabel: whether the model gives several labels.
        purpose: what it wants.
        images: in the order in which they were sent; at least one to classify or explain.
        protocol: which the answer follows too.
        client_id: the client's own id for it, where the protocol has one.
        outputs: the tensors that a KServe V2 request wants, in order.
        class_index: the class to explain; None for each image's best one.
        as_picture: explain with a picture instead of numbers; then there is one image.
        error: what is wrong with it as a whole.
        response: what it is answered.
    """

    request_id: str
    row: Mapping[str, Any]
    headers: Mapping[str, Any]
    options: Options
    multilabel: bool = False
    purpose: Purpose = Purpose.CLASSIFY
    images: list[RequestImage] = field(default_factory=list)
    protocol: Protocol = Protocol.PLAIN
    client_id: str | None = None
    outputs: Sequence[OutputTensor] = ()
    class_index: int | None = None
    as_picture: bool = False
    error: RequestError | None = None
    response: Response | None = None

    @property
    def wants_embeddings(self) -> bool:
        """In each result, or as a tensor of KServe V2."""
        return self.options.embedding or any(output.name == EMBEDDING for output in self.outputs)

    def header(self, name: str) -> str:
        """A header of the request, whatever its case; empty where there is none."""
        return self._by_name.get(name, "")

    @cached_property
    def _by_name(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in self.headers.items():
            if isinstance(value, str):  # and not a part's own
                found.setdefault(name.lower(), value.strip())
        return found


class _Fallible(typing.Protocol):
    request_id: str
    error: RequestError | None


_T = TypeVar("_T", bound=_Fallible)


def attempt(one: _T, stage: Callable[[_T], None]) -> None:
    """Runs a stage for one request or image. Whatever it raises becomes that one's error.

    One that has failed already is left as it is.
    """
    if one.error is not None:
        return
    try:
        stage(one)
    except RequestError as error:
        one.error = error.bare()
    except Exception:  # whatever it is, RecursionError and MemoryError too: see above
        logger.exception("Failed on request %s", one.request_id)
        one.error = InternalError(one.request_id)


def together(group: Sequence[_T], stage: Callable[[Sequence[_T]], None]) -> None:
    """Runs a stage for several at once; where it raises, for each alone, to lose only the culprit.

    Those that have failed already are left as they are.
    """
    sound = [one for one in group if one.error is None]
    if not sound:
        return
    try:
        stage(sound)
    except Exception:
        logger.warning("Failed on %d at once; now one by one", len(sound), exc_info=True)
        for one in sound:
            attempt(one, lambda alone: stage([alone]))
