"""A client for an image classification service, for programs; its command is `classify`.

Example:
    with Client("http://127.0.0.1:8080/predictions/densenet121") as client:
        print(client.classify(Path("cat.jpg")).label)
"""

from classification_client.client import (
    Classification,
    Client,
    ModelVersion,
    Prediction,
    RefusedError,
    RequestOptions,
    ServiceError,
    UnavailableError,
)
from classification_client.reading import PassingError

__all__ = [
    "Classification",
    "Client",
    "ModelVersion",
    "PassingError",
    "Prediction",
    "RefusedError",
    "RequestOptions",
    "ServiceError",
    "UnavailableError",
]
