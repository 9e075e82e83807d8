"""Sends requests that schemathesis generates from the description of the HTTP API."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]


def operations(document: dict[str, Any]) -> list[Any]:
    """Return the operations of an OpenAPI document."""
    loaded: Any = schemathesis.openapi.from_dict(document)
    return [found.ok() for found in loaded.get_all_operations()]


def check_operation(operation: Any, url: str, requests: int = 20) -> None:
    """Send generated requests, the same in each run; each response must be as described."""

    @settings(
        max_examples=requests,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(base_url=url, checks=_CHECKS)

    check()
