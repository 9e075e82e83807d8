"""The errors of this package: `ClientError`, and below it what each class says."""

from classification_client.answers import ModelVersion

# Statuses about the body of a request, and the types among them that are not about the image. The
# last two carry no error of this service, so that they may come from anybody.
_ABOUT_THE_BODY = {400, 413, 415}
_NOT_ABOUT_THE_IMAGE = {
    *("BadRequest", "MissingImage", "RepeatedPart", "TooManyImages", "BadRequestException"),
    *("HTTPError", "NotThisService"),
}


class ClientError(Exception):
    """Any error of this package."""


class ServiceError(ClientError):
    """The service did not classify an image; `str(error)` gives the reason."""


class RefusedError(ServiceError):
    """The server rejected the request: a retry would not help.

    `code` is the HTTP status, `type` the server's name for the error, such as "NotAnImage". `model`
    is None if it was not a model that rejected it.
    """

    def __init__(
        self, code: int, type_: str, message: str, model: ModelVersion | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.type, self.message, self.model = code, type_, message, model

    @property
    def is_about_the_image(self) -> bool:
        """Whether another image could be accepted."""
        return self.code in _ABOUT_THE_BODY and self.type not in _NOT_ABOUT_THE_IMAGE


class UnavailableError(ServiceError):
    """The server cannot be reached, or gave no answer within the patience."""


class PassingError(ClientError, OSError):
    """A file cannot be read now, for a reason that is not the file's own and may pass."""


class UserError(ClientError):
    """A command cannot go on; `str(error)` tells the user what is wrong and what to do."""
