"""Serve KServe's gRPC protocol, the Open Inference Protocol; `GRPC=on` starts this server.

Each call becomes a request to nginx, with the same limits, readiness and log as HTTP requests.
TorchServe's own gRPC is disabled: KServe's and Triton's clients use another package name, it does
not read tensors in raw bytes, always reports ready, and its streams let any client stop all
workers.
"""

import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from deploy.container.open_inference import messages
from handler.settings import MAX_REQUEST_BYTES
from scripts.gateway.template import has_ipv6

SERVICE = "inference.GRPCInferenceService"
CALLS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
# Concurrent calls. Each holds a message, which takes twice 20 MB while it is read.
_MAX_CALLS = 16
# Maximum size of names, shapes and parameters in a message.
_MAX_OTHER_BYTES = 65_536
# TorchServe's timeout for a worker.
_MAX_SECONDS = 60.0
_JSON_LENGTH = "Inference-Header-Content-Length"
# Other 4xx statuses become INVALID_ARGUMENT.
_STATUSES = {
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.UNAVAILABLE,
}


class CallError(Exception):
    """An HTTP response other than 200; the message is for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def start(http_port: int, port: int) -> grpc.Server:
    """Serve on `port`, on all addresses; `http_port` is nginx's."""
    handlers = {name: _handler(name, http_port) for name in CALLS}
    server = grpc.server(
        ThreadPoolExecutor(_MAX_CALLS),
        [grpc.method_handlers_generic_handler(SERVICE, handlers)],
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES + _MAX_OTHER_BYTES),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=_MAX_CALLS,
    )
    server.add_insecure_port(f"{'[::]' if has_ipv6() else '0.0.0.0'}:{port}")
    server.start()
    return server


def _handler(name: str, http_port: int) -> "grpc.RpcMethodHandler[Any, Any]":
    def answer(message: Message, context: grpc.ServicerContext) -> Message:
        left = context.time_remaining()
        try:
            return call(name, message, http_port, min(_MAX_SECONDS, left or _MAX_SECONDS))
        except CallError as error:
            code = _STATUSES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
            context.abort(code, str(error))

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=getattr(messages, f"{name}Request").FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


def call(name: str, request: Any, port: int, seconds: float) -> Message:
    """Send a call to nginx as a request, and return the response.

    Raises:
        CallError: the request is invalid, or there was no response within `seconds`.
    """
    match name:
        case "ModelInfer":
            path = f"{_model_path(request.model_name, request.model_version)}/infer"
            return from_http(*_send_request(port, path, seconds, to_http(request)))
        case "ModelReady":
            path = f"{_model_path(request.name, request.version)}/ready"
        case "ModelMetadata":
            path = _model_path(request.name, request.version)
        case "ServerMetadata":
            path = "/v2"
        case _:
            path = f"/v2/health/{name.removeprefix('Server').lower()}"
    response: Message = getattr(messages, f"{name}Response")()
    try:
        content, _ = _send_request(port, path, seconds)
    except CallError as error:
        if error.status == HTTPStatus.SERVICE_UNAVAILABLE and name.endswith(("Live", "Ready")):
            return response  # its field is false
        raise
    return ParseDict(json.loads(content), response, ignore_unknown_fields=True)


def _model_path(name: str, version: str) -> str:
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _send_request(
    port: int, path: str, seconds: float, parts: Sequence[bytes] = ()
) -> tuple[bytes, int | None]:
    """Send a GET request, or JSON and tensors, to nginx.

    Returns:
        the response's body, and the length of its JSON if tensors follow.
    """
    method, headers = "GET", {}
    if parts:
        method = "POST"
        headers["Content-Type"] = "application/octet-stream"
        headers["Content-Length"] = str(sum(map(len, parts)))
        headers[_JSON_LENGTH] = str(len(parts[0]))
    connection = HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, parts or None, headers)
        answer = connection.getresponse()
        content = answer.read()
    except TimeoutError as error:
        raise CallError(504, f"There was no answer within {seconds:.0f} s.") from error
    except (OSError, HTTPException) as error:
        raise CallError(503, "The service cannot be reached. Retry in a second.") from error
    finally:
        connection.close()
    if answer.status != HTTPStatus.OK:
        try:
            message = str(json.loads(content)["message"])
        except (ValueError, LookupError, TypeError):
            message = "The request failed."
        raise CallError(answer.status, message)
    length = answer.headers.get(_JSON_LENGTH)
    return content, None if length is None else int(length)


def to_http(request: Any) -> list[bytes]:
    """Return a `ModelInferRequest` as the protocol's JSON, and the tensors that follow it.

    Raises:
        CallError: the tensors' contents are missing, or of an unsupported datatype.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise CallError(400, f"{len(request.inputs)} inputs have {len(raw)} raw_input_contents.")
    tensors = raw or [_content(tensor) for tensor in request.inputs]
    document = {
        **({"id": request.id} if request.id else {}),
        "parameters": {**_parameters(request), "binary_data_output": True},
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {**_parameters(tensor), "binary_data_size": len(content)},
            }
            for tensor, content in zip(request.inputs, tensors, strict=True)
        ],
        "outputs": [{"name": o.name, "parameters": _parameters(o)} for o in request.outputs],
    }
    return [json.dumps(document).encode(), *tensors]


def _content(tensor: Any) -> bytes:
    match tensor.datatype:
        case "BYTES":
            elements = tensor.contents.bytes_contents
            return b"".join(struct.pack("<I", len(e)) + e for e in elements)
        case "UINT8":
            try:
                return bytes(tensor.contents.uint_contents)
            except ValueError as error:
                raise CallError(400, "A UINT8 tensor's elements must be 0 to 255.") from error
    kind = tensor.datatype[:20]
    raise CallError(400, f"A tensor's datatype must be BYTES or UINT8, got {kind!r}.")


def _parameters(of: Any) -> dict[str, Any]:
    return {
        parameter.key: getattr(
            parameter.value, parameter.value.WhichOneof("parameter_choice") or "string_param"
        )
        for parameter in of.parameters
        if not parameter.key.startswith("binary_data")  # set above
    }


def from_http(body: bytes, length: int | None) -> Message:
    """Return a `ModelInferResponse` from JSON of the given length and the tensors after it."""
    document = json.loads(body[:length])
    response = messages.ModelInferResponse()
    start = len(body) if length is None else length
    for tensor in document["outputs"]:
        end = start + tensor.pop("parameters")["binary_data_size"]
        response.raw_output_contents.append(body[start:end])
        start = end
    return ParseDict(document, response, ignore_unknown_fields=True)
