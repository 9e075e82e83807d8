"""The container's HTTP API is as its OpenAPI document describes it."""

from typing import Any

import pytest
import requests

from scripts.gateway import openapi
from scripts.store import PACKAGED_ARCHITECTURE
from tests.containers.running import Container
from tests.generated_requests import check_operation, operations

DESCRIPTION = openapi.describe("container", [PACKAGED_ARCHITECTURE])


@pytest.fixture(scope="module")
def url(served: Container) -> str:
    return f"http://127.0.0.1:{served.ports[8080]}"


@pytest.mark.parametrize("operation", operations(DESCRIPTION), ids=lambda one: one.label)
def test_responses_to_generated_requests_are_as_described(operation: Any, url: str) -> None:
    check_operation(operation, url)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v2", "GET, HEAD"),
        ("/v2/health/ready", "GET, HEAD"),
        ("/docs", "GET, HEAD"),
        ("/predict", "POST, PUT"),
    ],
)
def test_other_methods_are_rejected_with_the_list_of_those_allowed(
    path: str, allowed: str, url: str
) -> None:
    answer = requests.delete(url + path, timeout=60)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
