"""The container's gRPC: messages, and their way to HTTP and back."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import grpc
import pytest

from deploy.container.grpc_server import SERVICE, CallError, call, from_http, start, to_http
from deploy.container.open_inference import messages
from scripts.serve.running import unused_ports

# A request that protoc's classes of the published .proto serialized.
GOLDEN = (
    b'\n\x01m\x12\x011\x1a\x017"\n\n\x04topk\x12\x02\x10\x01* \n\x06images\x12\x05BYTES\x1a\x01\x02'
    b'*\x0c"\x03\x01\xff\x01B\x01aB\x02bc2\x14\n\x06result\x12\n\n\x04deep\x12\x02\x08\x01:\x01r'
)


def test_messages_are_encoded_as_in_the_published_protocol() -> None:
    request = messages.ModelInferRequest.FromString(GOLDEN)
    assert (request.model_name, request.model_version, request.id) == ("m", "1", "7")
    (topk,) = request.parameters
    assert (topk.key, topk.value.WhichOneof("parameter_choice")) == ("topk", "int64_param")
    (tensor,) = request.inputs
    assert (tensor.datatype, list(tensor.shape)) == ("BYTES", [2])
    assert list(tensor.contents.bytes_contents) == [b"a", b"bc"]
    assert list(tensor.contents.uint_contents) == [1, 255]
    assert request.outputs[0].parameters[0].value.bool_param
    assert list(request.raw_input_contents) == [b"r"]
    assert request.SerializeToString() == GOLDEN


def test_tensors_may_be_in_contents() -> None:
    """KServe's and Triton's clients send raw bytes; others of the protocol need not."""
    request = messages.ModelInferRequest(model_name="m", id="7")
    request.parameters.add(key="topk").value.int64_param = 1
    texts = request.inputs.add(name="images", datatype="BYTES", shape=[2])
    texts.contents.bytes_contents.extend([b"a", b"bc"])
    octets = request.inputs.add(name="more", datatype="UINT8", shape=[2])
    octets.contents.uint_contents.extend([1, 255])
    text, *data = to_http(request)
    assert data == [b"\x01\0\0\0a\x02\0\0\0bc", b"\x01\xff"]
    document = json.loads(text)
    assert document["id"] == "7"
    assert document["parameters"] == {"topk": 1, "binary_data_output": True}
    sizes = [tensor["parameters"]["binary_data_size"] for tensor in document["inputs"]]
    assert sizes == [11, 2]


def test_an_answer_with_binary_tensors_becomes_a_message() -> None:
    tensor = {"name": "class_id", "datatype": "BYTES", "shape": [1]}
    document = {"model_name": "m", "model_version": "1", "id": "7", "outputs": [tensor]}
    text = json.dumps(
        document | {"outputs": [tensor | {"parameters": {"binary_data_size": 5}}]}
    ).encode()
    response: Any = from_http(text + b"\x01\0\0\0a", len(text))
    assert (response.model_name, response.id) == ("m", "7")
    assert [output.name for output in response.outputs] == ["class_id"]
    assert list(response.raw_output_contents) == [b"\x01\0\0\0a"]


def test_without_a_server_readiness_is_false_and_a_call_is_unavailable() -> None:
    (port,) = unused_ports(1)
    ready = call("ServerReady", messages.ServerReadyRequest(), port, seconds=5)
    assert ready == messages.ServerReadyResponse()
    with pytest.raises(CallError, match="cannot be reached") as failed:
        call("ModelInfer", messages.ModelInferRequest(model_name="m"), port, seconds=5)
    assert failed.value.status == 503


def test_tensors_of_other_types_or_ranges_are_rejected() -> None:
    request = messages.ModelInferRequest(model_name="m")
    request.inputs.add(name="images", datatype="FP32", shape=[1]).contents.fp32_contents.append(1)
    with pytest.raises(CallError, match="must be BYTES or UINT8"):
        to_http(request)
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].contents.uint_contents.append(256)
    with pytest.raises(CallError, match="0 to 255"):
        to_http(request)
    request.raw_input_contents.extend([b"a", b"b"])
    with pytest.raises(CallError, match="1 inputs have 2 raw_input_contents"):
        to_http(request)


class _Slow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"live": true}')

    def log_message(self, *_: Any) -> None:
        pass


def test_a_call_in_flight_is_answered_before_the_server_stops() -> None:
    (port,) = unused_ports(1)
    with (
        HTTPServer(("127.0.0.1", 0), _Slow) as nginx,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ThreadPoolExecutor() as pool,
    ):
        Thread(target=nginx.handle_request).start()
        server = start(nginx.server_port, port)
        live: Any = channel.unary_unary(f"/{SERVICE}/ServerLive", lambda message: b"")
        answer = pool.submit(live, messages.ServerLiveRequest(), timeout=10, wait_for_ready=True)
        time.sleep(0.5)
        assert not answer.done()
        server.stop(10).wait()
        assert messages.ServerLiveResponse.FromString(answer.result(timeout=5)).live
