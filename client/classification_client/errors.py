"""The errors of this package, all derived from `ClientError`."""

from classification_client.responses import ModelVersion

# Statuses from here on are the server's errors, not the request's.
_SERVER_ERROR = 500
# Statuses that concern the request's body, and error types that do not concern the image. The last
# two types stand for responses without an error of this service, such as those of a proxy.
_ABOUT_THE_BODY = {400, 413, 415}
_NOT_ABOUT_THE_IMAGE = {
    *("BadRequest", "MissingImage", "RepeatedPart", "TooManyImages", "BadRequestException"),
    *("HTTPError", "NotThisService"),
}


class ClientError(Exception):
    """Any error of this package.

    Attributes:
        is_permanent: whether the same request or command would fail again.
    """

    is_permanent = False


class ServiceError(ClientError):
    """The service did not classify an image; `str(error)` is the reason."""


class RejectedError(ServiceError):
    """The server rejected the request; a retry would not help.

    Attributes:
        code: the HTTP status.
        type: the server's name for the error, such as "NotAnImage".
        message: the server's message.
        model: the model that rejected the request; None if it did not reach a model.
    """

    def __init__(
        self, code: int, type_: str, message: str, model: ModelVersion | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.type, self.message, self.model = code, type_, message, model
        self.is_permanent = code < _SERVER_ERROR

    @property
    def is_about_the_image(self) -> bool:
        """Return whether the server could accept another image."""
        return self.code in _ABOUT_THE_BODY and self.type not in _NOT_ABOUT_THE_IMAGE


class UnavailableError(ServiceError):
    """The server cannot be reached, or did not respond within `RequestOptions.patience`."""

    def __init__(self, message: str, *, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


class TransientError(ClientError, OSError):
    """A file cannot be read because of a transient error, such as one of a network drive."""


class UserError(ClientError):
    """A command cannot continue; `str(error)` states the problem and the remedy for the user."""

    is_permanent = True


# Names of earlier releases.
RefusedError, PassingError = RejectedError, TransientError
