"""KServe's gRPC, the Open Inference Protocol, for clients that speak no HTTP: `GRPC=on` starts it.

TorchServe has that protocol, but under a package name that no client of KServe's or Triton's asks
for, without tensors in raw bytes, which both send, and always ready; and beside it are streams by
which any client can end all workers. So its port stays closed, and each call is asked here over
HTTP, with the limits, the readiness and the log of all other requests.
"""

import json
import re
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.message import Message

from deploy.container import open_inference_pb2 as messages
from handler.settings import MAX_REQUEST_BYTES

SERVICE = "inference.GRPCInferenceService"

# Each holds a message: twice 20 MB while it is read.
_MOST_AT_ONCE = 16
# Names, shapes and parameters beside the pictures.
_BESIDE_PICTURES = 65_536
# Seconds: as long as TorchServe waits for a worker.
_LONGEST = 60.0
_GRACE = 20.0
_JSON_LENGTH = "Inference-Header-Content-Length"

_STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Failed(Exception):  # noqa: N818
    """An answer over HTTP that is not 200."""

    def __init__(self, status: int, message: str) -> None:
        """Takes HTTP's status, and the message for the client."""
        super().__init__(message)
        self.status = status


class Calls:
    """The service's calls, each an address of the HTTP service's."""

    def __init__(self, port: int) -> None:
        """Takes the port of the HTTP service, on this machine."""
        self._port = port

    def server_live(self, _: Message, seconds: float) -> Message:
        """Whether it answers at all, within so many seconds, as the others."""
        return messages.ServerLiveResponse(live=self._is("/v2/health/live", "live", seconds))

    def server_ready(self, _: Message, seconds: float) -> Message:
        """Whether each model has a worker that is ready."""
        return messages.ServerReadyResponse(ready=self._is("/v2/health/ready", "ready", seconds))

    def model_ready(self, request: Any, seconds: float) -> Message:
        """Whether a model has one."""
        path = f"{_model(request.name, request.version)}/ready"
        return messages.ModelReadyResponse(ready=self._is(path, "ready", seconds))

    def server_metadata(self, _: Message, seconds: float) -> Message:
        """What serves."""
        return messages.ServerMetadataResponse(**self._json("/v2", seconds))

    def model_metadata(self, request: Any, seconds: float) -> Message:
        """A model's tensors and version."""
        path = _model(request.name, request.version)
        return messages.ModelMetadataResponse(**self._json(path, seconds))

    def model_infer(self, request: Any, seconds: float) -> Message:
        """Classifies pictures."""
        document, tensors = to_http(request)
        text = json.dumps(document).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(text) + sum(map(len, tensors))),
            _JSON_LENGTH: str(len(text)),
        }
        path = f"{_model(request.model_name, request.model_version)}/infer"
        body, length = self._ask("POST", path, [text, *tensors], headers, seconds)
        return from_http(body, length)

    def _is(self, path: str, what: str, seconds: float) -> bool:
        try:
            return bool(self._json(path, seconds)[what])
        except Failed as error:
            if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
                return False
            raise

    def _json(self, path: str, seconds: float) -> Any:
        return json.loads(self._ask("GET", path, None, {}, seconds)[0])

    def _ask(
        self,
        method: str,
        path: str,
        body: Iterable[bytes] | None,
        headers: Mapping[str, str],
        seconds: float,
    ) -> tuple[bytes, int | None]:
        """An answer's body, and where its JSON ends if there is more behind it."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except TimeoutError as error:
            raise Failed(504, f"There was no answer within {seconds:.0f} s.") from error
        except (OSError, HTTPException) as error:
            raise Failed(503, "The service cannot be asked just now. Ask again.") from error
        finally:
            connection.close()
        if answer.status != HTTPStatus.OK:
            raise Failed(answer.status, _message(content))
        length = answer.headers.get(_JSON_LENGTH)
        return content, None if length is None else int(length)


def _model(name: str, version: str) -> str:
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["message"])
    except (ValueError, LookupError, TypeError):
        return "The request failed."


# --- Tensors ---


def to_http(request: Any) -> tuple[dict[str, Any], list[bytes]]:
    """A `ModelInferRequest` as the JSON of the same protocol, and the tensors behind it.

    Raises:
        Failed: the tensors' contents are missing, or of no kind that holds pictures.
    """
    inputs, data = [], []
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise Failed(400, f"{len(request.inputs)} inputs have {len(raw)} raw_input_contents.")
    for i, tensor in enumerate(request.inputs):
        content = raw[i] if raw else _content(tensor)
        data.append(content)
        inputs.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {**_parameters(tensor), "binary_data_size": len(content)},
            }
        )
    document = {
        "id": request.id,
        "parameters": {**_parameters(request), "binary_data_output": True},
        "inputs": inputs,
        "outputs": [{"name": o.name, "parameters": _parameters(o)} for o in request.outputs],
    }
    if not request.id:
        del document["id"]
    return document, data


def _content(tensor: Any) -> bytes:
    match tensor.datatype:
        case "BYTES":
            elements = tensor.contents.bytes_contents
            return b"".join(struct.pack("<I", len(e)) + e for e in elements)
        case "UINT8":
            try:
                return bytes(tensor.contents.uint_contents)
            except ValueError as error:
                raise Failed(400, "A UINT8 tensor's elements must be 0 to 255.") from error
    raise Failed(400, f"A tensor's datatype must be BYTES or UINT8, got {tensor.datatype[:20]!r}.")


def _parameters(of: Any) -> dict[str, Any]:
    return {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
        for name, parameter in of.parameters.items()
        if not re.fullmatch("binary_data.*", name)  # how bytes travel is settled here
    }


def from_http(body: bytes, length: int | None) -> Message:
    """A `ModelInferResponse` from JSON of the given length and the tensors behind it."""
    document = json.loads(body[:length])
    response = messages.ModelInferResponse(
        model_name=document["model_name"],
        model_version=document["model_version"],
        id=document.get("id", ""),
    )
    at = len(body) if length is None else length
    for tensor in document["outputs"]:
        size = tensor["parameters"]["binary_data_size"]
        response.outputs.add(
            name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"]
        )
        response.raw_output_contents.append(body[at : at + size])
        at += size
    return response


# --- The server ---


def start(http_port: int, address: str) -> grpc.Server:
    """Starts the service.

    Args:
        http_port: of the HTTP service, on this machine.
        address: where to listen, such as `[::]:9000`.
    """
    server = grpc.server(
        ThreadPoolExecutor(_MOST_AT_ONCE),
        maximum_concurrent_rpcs=_MOST_AT_ONCE,
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES + _BESIDE_PICTURES),
            ("grpc.so_reuseport", 0),
        ],
    )
    calls = Calls(http_port)
    handlers = {
        "ServerLive": _handler(calls.server_live, messages.ServerLiveRequest),
        "ServerReady": _handler(calls.server_ready, messages.ServerReadyRequest),
        "ModelReady": _handler(calls.model_ready, messages.ModelReadyRequest),
        "ServerMetadata": _handler(calls.server_metadata, messages.ServerMetadataRequest),
        "ModelMetadata": _handler(calls.model_metadata, messages.ModelMetadataRequest),
        "ModelInfer": _handler(calls.model_infer, messages.ModelInferRequest),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(address)
    server.start()
    return server


def _handler(
    call: Callable[[Any, float], Message], request: Any
) -> "grpc.RpcMethodHandler[Any, Any]":
    def answer(message: Message, context: grpc.ServicerContext) -> Message:
        left = context.time_remaining()
        try:
            return call(message, min(_LONGEST, left if left is not None else _LONGEST))
        except Failed as error:
            context.abort(_STATUSES.get(error.status, grpc.StatusCode.INTERNAL), str(error))

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


def main() -> None:
    """Serves until SIGTERM, and answers what is in hand then.

    The command line has the port of the HTTP service, and the port to listen on.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    http_port, port = map(int, sys.argv[1:])
    server = start(http_port, f"[::]:{port}")
    stop.wait()
    server.stop(_GRACE).wait()


if __name__ == "__main__":
    main()
