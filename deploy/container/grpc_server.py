"""KServe's gRPC, the Open Inference Protocol, for clients without HTTP: `GRPC=on` starts it.

Each call becomes a request to nginx, with the limits, readiness and log of all others. TorchServe's
own gRPC stays closed: its package name is not that of KServe's and Triton's clients, it reads no
tensors in raw bytes, it is always ready, and its streams let any client stop all workers.
"""

import json
import signal
import struct
import sys
import threading
from collections.abc import Callable, Sequence
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
# Concurrent calls. Each holds a message: twice 20 MB while it is read.
_MAX_CALLS = 16
# Limit of names, shapes and parameters in a message.
_MAX_OTHER_BYTES = 65_536
# As long as TorchServe waits for a worker.
_MAX_SECONDS = 60.0
_JSON_LENGTH = "Inference-Header-Content-Length"
# Others of 4xx are INVALID_ARGUMENT.
_STATUSES = {
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.UNAVAILABLE,
}
# The calls other than ModelInfer, and the paths whose JSON has the fields of their responses.
_PATHS: dict[str, Callable[[Any], str]] = {
    "ServerLive": lambda _: "/v2/health/live",
    "ServerReady": lambda _: "/v2/health/ready",
    "ModelReady": lambda request: f"{_model_path(request.name, request.version)}/ready",
    "ServerMetadata": lambda _: "/v2",
    "ModelMetadata": lambda request: _model_path(request.name, request.version),
}


class CallError(Exception):
    """An answer over HTTP that is not 200; the message is for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def call(name: str, request: Any, port: int, seconds: float) -> Message:
    """Answer a call of the service by sending a request to nginx.

    Raises:
        CallError: the request is wrong, or there was no answer within `seconds`.
    """
    if name == "ModelInfer":
        return _infer(request, port, seconds)
    response = getattr(messages, f"{name}Response")()
    try:
        document = json.loads(_send_request(port, _PATHS[name](request), seconds)[0])
    except CallError as error:
        if error.status == HTTPStatus.SERVICE_UNAVAILABLE and name.endswith(("Live", "Ready")):
            return response  # false
        raise
    return ParseDict(document, response, ignore_unknown_fields=True)


def _infer(request: Any, port: int, seconds: float) -> Message:
    document, tensors = to_http(request)
    path = f"{_model_path(request.model_name, request.model_version)}/infer"
    return from_http(*_send_request(port, path, seconds, [json.dumps(document).encode(), *tensors]))


def _send_request(
    port: int, path: str, seconds: float, parts: Sequence[bytes] = ()
) -> tuple[bytes, int | None]:
    """Send nginx a GET request, or JSON and tensors, and return its answer.

    Returns:
        The body, and the length of its JSON if tensors follow.
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


def _model_path(name: str, version: str) -> str:
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


# --- Tensors ---


def to_http(request: Any) -> tuple[dict[str, Any], list[bytes]]:
    """Return a `ModelInferRequest` as the JSON of the same protocol, and the tensors behind it.

    Raises:
        CallError: the tensors' contents are missing, or of a type that holds no images.
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
    return document, tensors


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
        name: getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
        for name, parameter in of.parameters.items()
        if not name.startswith("binary_data")  # set above
    }


def from_http(body: bytes, length: int | None) -> Message:
    """Return a `ModelInferResponse` from JSON of the given length and the tensors behind it."""
    document = json.loads(body[:length])
    response = messages.ModelInferResponse()
    start = len(body) if length is None else length
    for tensor in document["outputs"]:
        end = start + tensor.pop("parameters")["binary_data_size"]
        response.raw_output_contents.append(body[start:end])
        start = end
    return ParseDict(document, response, ignore_unknown_fields=True)


# --- The server ---


def _handler(name: str, port: int) -> "grpc.RpcMethodHandler[Any, Any]":
    def answer(message: Message, context: grpc.ServicerContext) -> Message:
        left = context.time_remaining()
        try:
            return call(name, message, port, min(_MAX_SECONDS, left or _MAX_SECONDS))
        except CallError as error:
            code = _STATUSES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
            context.abort(code, str(error))

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=getattr(messages, f"{name}Request").FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


def main() -> None:
    """Serve until SIGTERM, then drain; the sender of SIGTERM sets the time limit.

    The command line has nginx's port, and the port to listen on.
    """
    http_port, port = map(int, sys.argv[1:])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    handlers = {name: _handler(name, http_port) for name in (*_PATHS, "ModelInfer")}
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
    stop.wait()
    server.stop(_MAX_SECONDS).wait()


if __name__ == "__main__":
    main()
