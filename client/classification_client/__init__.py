"""A client library for an image classification service; its command is `classify`.

Example:
    with Client("http://127.0.0.1:8080/predictions/densenet121") as client:
        print(client.classify(Path("cat.jpg")).label)
"""

from classification_client.bulk import classify_all
from classification_client.client import Client, RequestOptions, check_address
from classification_client.errors import (
    ClientError,
    PassingError,
    RefusedError,
    RejectedError,
    ServiceError,
    TransientError,
    UnavailableError,
)
from classification_client.responses import Classification, ModelVersion, Prediction
from classification_client.results import Row

__all__ = [
    "Classification",
    "Client",
    "ClientError",
    "ModelVersion",
    "PassingError",
    "Prediction",
    "RefusedError",
    "RejectedError",
    "RequestOptions",
    "Row",
    "ServiceError",
    "TransientError",
    "UnavailableError",
    "check_address",
    "classify_all",
]
