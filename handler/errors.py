"""Errors of a request, and of an archive.

A request becomes a response in four stages, each with errors of its own:

    parts --parse--> bytes and options --decode--> pixels --infer--> logits --respond--> response
         BadRequest, MissingImage, RepeatedPart, TooManyImages, InvalidOption, NoExplanation,
         NoEmbedding
                             EmptyImage, NotAnImage, DamagedImage, UnsupportedFormat, TooLarge
                                                                           AnswerTooLarge

Everything a client can cause is a `ClientError`: its class decides status and type, its message is
written for the person who sent the request. Anything else, in any stage, is an `InternalError`,
whose detail stays in the server's log.
"""

from typing import ClassVar, TypeVar

_Error = TypeVar("_Error", bound="RequestError")


class RequestError(Exception):
    """The response to a request, or to one of its images, instead of a result.

    `str(error)` goes to the client.
    """

    status: ClassVar[int]
    type: ClassVar[str]

    def without_traceback(self: _Error) -> _Error:  # Python 3.10 has no Self
        """Return itself without traceback and causes, which would keep bodies and images alive."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class InternalError(RequestError):
    """A fault of the server: the client gets only an id by which the log has the cause.

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
    """The client has gone, or would have before it got a response."""

    status = 504
    type = "Timeout"


class ClientError(RequestError):
    """Something the client sent cannot be served.

    `str(error)` says what was wrong, with what, and what to do.
    """


class BadRequest(ClientError):
    """The request's body cannot be read as any of the accepted forms."""

    status = 400
    type = "BadRequest"


class MissingImage(ClientError):
    """The request holds no image at all."""

    status = 400
    type = "MissingImage"


class RepeatedPart(ClientError):
    """A form has two parts of one name, of which the frontend passes on only one."""

    status = 400
    type = "RepeatedPart"


class EmptyImage(ClientError):
    """An image was announced, but has no bytes."""

    status = 400
    type = "EmptyImage"


class NotAnImage(ClientError):
    """The bytes are not an image in any known format."""

    status = 400
    type = "NotAnImage"


class DamagedImage(ClientError):
    """The bytes begin as an image, but are cut off or corrupt."""

    status = 400
    type = "DamagedImage"


class TooLarge(ClientError):
    """An image has more pixels than the server accepts, or takes more memory or time."""

    status = 413
    type = "TooLarge"


class TooManyImages(ClientError):
    """A request has more images than the server accepts at once."""

    status = 413
    type = "TooManyImages"


class AnswerTooLarge(ClientError):
    """The response would be larger than TorchServe passes on."""

    status = 413
    type = "AnswerTooLarge"


class UnsupportedFormat(ClientError):
    """A well-known file format, or kind of pixels, but not one that is read."""

    status = 415
    type = "UnsupportedFormat"


class InvalidOption(ClientError):
    """An option such as `topk` has a value that cannot be used."""

    status = 422
    type = "InvalidOption"


class NoExplanation(ClientError):
    """The model's architecture has no class activation map."""

    status = 404
    type = "NoExplanation"


class NoEmbedding(ClientError):
    """The archive gives no embeddings."""

    status = 404
    type = "NoEmbedding"


class ArchiveError(RuntimeError):
    """The archive cannot be served as it is: a file is missing or malformed.

    A `RuntimeError`, because that is what TorchServe's worker logs and reports while it loads a
    model; other exceptions crash the worker without a reply to the frontend.
    """
