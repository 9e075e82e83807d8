"""Errors of a request or an archive.

A request becomes a response in four stages, each with its own errors:

    parts --parse--> bytes and options --decode--> pixels --infer--> logits --respond--> response
         BadRequest, MissingImage, RepeatedPart, TooManyImages, InvalidOption, NoExplanation,
         NoEmbedding
                             EmptyImage, NotAnImage, DamagedImage, UnsupportedFormat, TooLarge
                                                                           AnswerTooLarge

An error that a client can cause is a `ClientError`: its class determines status and type, its
message is written for the person who sent the request. Any other error is an `InternalError`, whose
detail is only logged.
"""

from typing import ClassVar, TypeVar

_Error = TypeVar("_Error", bound="RequestError")


class RequestError(Exception):
    """The error of a request or of one of its images; `str(error)` is sent to the client.

    A subclass has an HTTP status and a type, which is its name by default.
    """

    status: ClassVar[int]
    type: ClassVar[str]

    def __init_subclass__(cls, *, status: int = 0, type: str = "") -> None:
        if status:  # without a status it is a base class
            cls.status, cls.type = status, type or cls.__name__

    def without_traceback(self: _Error) -> _Error:  # Python 3.10 has no Self
        """Return this error without traceback and causes, which would keep bodies in memory."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class InternalError(RequestError, status=500):
    """A failure of the server; the client gets only the id under which the cause is logged.

    Attributes:
        detail: the cause; never sent to a client of the server.
    """

    def __init__(self, request_id: str, detail: str = "") -> None:
        self.detail = detail
        super().__init__(
            f"The server failed on this request; its log has the cause under id {request_id}."
        )


class Expired(RequestError, status=504, type="Timeout"):
    """The client disconnected, or would time out before the response."""


class ClientError(RequestError):
    """The request or an image cannot be served; the message states the problem and the remedy."""


class BadRequest(ClientError, status=400):
    """The request's body matches none of the accepted formats."""


class MissingImage(ClientError, status=400):
    """The request holds no image."""


class RepeatedPart(ClientError, status=400):
    """A form has two parts with the same name; the frontend passes on only one of them."""


class EmptyImage(ClientError, status=400):
    """An image has no bytes."""


class NotAnImage(ClientError, status=400):
    """The bytes are not an image in any known format."""


class DamagedImage(ClientError, status=400):
    """The image is cut off or corrupt."""


class TooLarge(ClientError, status=413):
    """An image exceeds the server's limits of pixels, memory or time."""


class TooManyImages(ClientError, status=413):
    """A request has more images than the server accepts."""


class AnswerTooLarge(ClientError, status=413):
    """The response would exceed TorchServe's limit."""


class UnsupportedFormat(ClientError, status=415):
    """The file format or the pixel format is known but not supported."""


class InvalidOption(ClientError, status=422):
    """An option such as `topk` has an invalid value."""


class NoExplanation(ClientError, status=404):
    """The model's architecture provides no class activation map."""


class NoEmbedding(ClientError, status=404):
    """The archive provides no embeddings."""


class ArchiveError(RuntimeError):
    """The archive cannot be served: a file is missing or malformed.

    A `RuntimeError`, since TorchServe's worker reports only those to the frontend while it loads a
    model; other exceptions crash the worker without a reply.
    """
