"""The description of the HTTP API: complete, true of the gateway, and served without a key."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deploy.container.routes import list_routes
from deploy.container.serving import Model
from handler import errors
from scripts.gateway import openapi
from scripts.gateway.config import routes
from tests.gateway.cluster import Gateway, error
from tests.generated_requests import check_operation, operations

GATEWAY = openapi.describe("gateway", ["densenet121"])
CONTAINER = openapi.describe("container", ["densenet121"])


def error_types(source: str) -> dict[str, list[int]]:
    """Return the described types of errors and their statuses."""
    described = GATEWAY["components"]["schemas"]["ErrorType"]["x-types"]
    return {each["name"]: each["status"] for each in described if source in each["source"]}


def subclasses(of: type[errors.RequestError]) -> Iterator[type[errors.RequestError]]:
    for each in of.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_error_type_of_the_handler_is_described_with_its_status() -> None:
    raised = {
        each.type: each.status for each in subclasses(errors.RequestError) if "type" in vars(each)
    }
    described = error_types("handler")
    assert described.keys() == raised.keys()
    assert all(status in described[name] for name, status in raised.items())


def test_every_error_type_of_nginx_is_described(client: Gateway) -> None:
    config = (client.folder / "nginx.conf").read_text()
    (mapping,) = re.findall(r"map \$status \$error_type \{(.*?)\}", config, re.DOTALL)
    sent = re.findall(r"(\d{3}|default) (\w+);", mapping)
    described = error_types("gateway")
    assert described.keys() == {name for _, name in sent}
    for status, name in sent:
        assert status == "default" or int(status) in described[name]


def test_every_example_matches_its_schema() -> None:
    components = GATEWAY["components"]
    others = {"MultiLabel": "Result", "NotRecognized": "Result", "NotAnImage": "ErrorResponse"}
    for name, example in components["examples"].items():
        reference = {"$ref": f"#/components/schemas/{others.get(name, name)}"}
        Draft202012Validator({**reference, "components": components}).validate(example["value"])


def test_the_described_paths_are_those_of_gateway_and_container() -> None:
    model = Model("densenet121", "1.0", Path("densenet121.mar"))
    for document, served, own in (
        (GATEWAY, routes("densenet121"), {"/healthz", "/readyz"}),
        (CONTAINER, list_routes([model], {}), {"/ping", "/live"}),
    ):
        described = {path.format(model="densenet121", version="1.0") for path in document["paths"]}
        assert described == {route.path for route in served} | own | {"/openapi.json", "/docs"}


def test_the_description_is_served_without_a_key_and_loads_nothing(keyed: Gateway) -> None:
    answer = keyed.ask("GET", "/openapi.json")
    assert answer.json() == GATEWAY
    assert answer.headers["content-type"].startswith("application/json")
    page = keyed.ask("GET", "/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src")
    assert page.headers["x-request-id"]
    assert not re.search(r"<script|src=|url\(|https?://(?!www\.w3)", page.text)
    assert "<code>POST, PUT /predict</code>" in page.text


def test_other_methods_than_the_described_ones_get_405(client: Gateway) -> None:
    for path, item in GATEWAY["paths"].items():
        if path not in {"/healthz", "/readyz"}:
            answer = client.ask("DELETE", path.format(model="densenet121"))
            assert error(answer) == (405, "MethodNotAllowed")
            described = {"head", *item} if "get" in item else {*item}
            assert {*answer.headers["Allow"].lower().split(", ")} == described - {"parameters"}


def test_each_documented_request_gets_a_response_of_its_schema(client: Gateway) -> None:
    components, sent = GATEWAY["components"], 0
    for path, item in GATEWAY["paths"].items():
        for method in item.keys() & {"post", "put"}:
            content = item[method]["requestBody"]["content"]["application/json"]
            for example in content["examples"].values():
                answer = client.ask(
                    method.upper(),
                    path.format(model="densenet121"),
                    json=components["examples"][example["$ref"].rpartition("/")[2]]["value"],
                    headers={"Accept": "application/json"},
                )
                assert answer.status_code == 200, f"{method} {path}: {answer.text}"
                schema = item[method]["responses"]["200"]["content"]["application/json"]["schema"]
                validator = Draft202012Validator({**schema, "components": components})
                validator.validate(answer.json())
                sent += 1
    assert sent >= 20


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations(GATEWAY), ids=lambda one: one.label)
def test_responses_to_generated_requests_are_as_described(operation: Any, client: Gateway) -> None:
    check_operation(operation, client.url)
