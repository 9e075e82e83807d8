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
    """The error of a request or of one of its images; `str(error)` is sent to the client."""

    status: ClassVar[int]
    type: ClassVar[str]

    def without_traceback(self: _Error) -> _Error:  # Python 3.10 has no Self
        """Return this error without traceback and causes, which would keep bodies in memory."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class InternalError(RequestError):
    """A failure of the server; the client gets only the id under which the cause is logged.

    Attributes:
        detail: the cause; never sent to a client of the server.
    """

    status = 500
    type = "InternalError"

    def __init__(self, request_id: str, detail: str = "") -> None:
        self.detail = detail
        super().__init__(
            f"The server failed on this request; its log has the cause under id {request_id}."
        )


class Expired(RequestError):
    """The client disconnected, or would time out before the response."""

    status = 504
    type = "Timeout"


class ClientError(RequestError):
    """The request or an image cannot be served; the message states the problem and the remedy."""


class BadRequest(ClientError):
    """The request's body matches none of the accepted formats."""

    status = 400
    type = "BadRequest"


class MissingImage(ClientError):
    """The request holds no image."""

    status = 400
    type = "MissingImage"


class RepeatedPart(ClientError):
    """A form has two parts with the same name; the frontend passes on only one of them."""

    status = 400
    type = "RepeatedPart"


class EmptyImage(ClientError):
    """An image has no bytes."""

    status = 400
    type = "EmptyImage"


class NotAnImage(ClientError):
    """The bytes are not an image in any known format."""

    status = 400
    type = "NotAnImage"


class DamagedImage(ClientError):
    """The image is cut off or corrupt."""

    status = 400
    type = "DamagedImage"


class TooLarge(ClientError):
    """An image exceeds the server's limits of pixels, memory or time."""

    status = 413
    type = "TooLarge"


class TooManyImages(ClientError):
    """A request has more images than the server accepts."""

    status = 413
    type = "TooManyImages"


class AnswerTooLarge(ClientError):
    """The response would exceed TorchServe's limit."""

    status = 413
    type = "AnswerTooLarge"


class UnsupportedFormat(ClientError):
    """The file format or the pixel format is known but not supported."""

    status = 415
    type = "UnsupportedFormat"


class InvalidOption(ClientError):
    """An option such as `topk` has an invalid value."""

    status = 422
    type = "InvalidOption"


class NoExplanation(ClientError):
    """The model's architecture provides no class activation map."""

    status = 404
    type = "NoExplanation"


class NoEmbedding(ClientError):
    """The archive provides no embeddings."""

    status = 404
    type = "NoEmbedding"


class ArchiveError(RuntimeError):
    """The archive cannot be served: a file is missing or malformed.

    A `RuntimeError`, since TorchServe's worker reports only those to the frontend while it loads a
    model; other exceptions crash the worker without a reply.
    """
