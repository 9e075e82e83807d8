"""Asks a server as KServe's or Triton's own client does, and prints what it answered as JSON.

It runs in an environment of its own, see requirements/clients.in:

    python ask.py kserve|triton ADDRESS GRPC_ADDRESS MODEL PICTURE

Addresses are HOST:PORT; without gRPC the second one is empty.
"""

import asyncio
import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def failure(call: Callable[[], object]) -> str:
    """What a client says of a call that fails."""
    try:
        return f"no error, but {call()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def afailure(call: Any) -> str:
    """The same for a call that is awaited."""
    try:
        return f"no error, but {await call!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def kserve(address: str, grpc_address: str, model: str, picture: bytes) -> dict[str, Any]:
    """Both of KServe's clients, over both versions of its protocol."""
    from kserve import (
        InferenceGRPCClient,
        InferenceRESTClient,
        InferInput,
        InferRequest,
        RESTConfig,
    )

    url = f"http://{address}"
    said: dict[str, Any] = {}
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", timeout=60))
    body = {"instances": [{"b64": base64.b64encode(picture).decode()}]}
    said["v1 live"] = await v1.is_server_live(url)
    said["v1 model ready"] = await v1.is_model_ready(url, model)
    said["v1 unknown model"] = await afailure(v1.is_model_ready(url, "nobody"))
    said["v1 predict"] = (await v1.infer(url, body, model_name=model))["predictions"][0]["class_id"]
    said["v1 explain"] = (await v1.explain(url, model, body))["explanations"][0]["class_id"]
    not_a_picture = {"instances": [{"b64": "bm8gcGljdHVyZQ=="}]}
    said["v1 error"] = await afailure(v1.infer(url, not_a_picture, model_name=model))
    await v1.close()

    def request(content: bytes) -> Any:
        tensor = InferInput("images", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([content], object))
        return InferRequest(model, [tensor], request_id="42")

    v2 = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    said["v2 live"] = await v2.is_server_live(url)
    said["v2 ready"] = await v2.is_server_ready(url)
    said["v2 model ready"] = await v2.is_model_ready(url, model)
    said["v2 unknown model ready"] = await v2.is_model_ready(url, "nobody")
    answer = await v2.infer(url, request(picture), model_name=model)
    said["v2 infer"] = _text(answer.outputs[0].as_numpy())
    said["v2 id"] = answer.id
    await v2.close()

    if grpc_address:
        client = InferenceGRPCClient(grpc_address, retries=0)
        said["grpc live"] = await client.is_server_live()
        said["grpc ready"] = await client.is_server_ready()
        said["grpc model ready"] = await client.is_model_ready(model)
        answer = await client.infer(request(picture))
        said["grpc infer"] = _text(answer.outputs[0].as_numpy())
        said["grpc id"] = answer.id
        said["grpc unknown model"] = await afailure(client.is_model_ready("nobody"))
        said["grpc error"] = await afailure(client.infer(request(b"no picture")))
        await client.close()
    return said


def triton(address: str, grpc_address: str, model: str, picture: bytes) -> dict[str, Any]:
    """Triton's clients over HTTP, and over gRPC where there is."""
    import tritonclient.http

    said = _triton(
        tritonclient.http, tritonclient.http.InferenceServerClient(address), model, picture
    )
    if grpc_address:
        import tritonclient.grpc

        client = tritonclient.grpc.InferenceServerClient(grpc_address)
        over = _triton(tritonclient.grpc, client, model, picture)
        said |= {f"grpc {name}": value for name, value in over.items()}
    return said


def _triton(module: Any, client: Any, model: str, picture: bytes) -> dict[str, Any]:
    def infer(content: bytes, name: str = model, **options: Any) -> Any:
        tensor = module.InferInput("images", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([content], object))
        return client.infer(name, [tensor], **options)

    octets = module.InferInput("images", [len(picture)], "UINT8")
    octets.set_data_from_numpy(np.frombuffer(picture, np.uint8))
    metadata = client.get_model_metadata(model)
    version = metadata["versions"][0] if isinstance(metadata, dict) else metadata.versions[0]
    inputs = metadata["inputs"] if isinstance(metadata, dict) else metadata.inputs
    wanted = [module.InferRequestedOutput("class_name"), module.InferRequestedOutput("probability")]
    few = infer(picture, outputs=wanted, request_id="42")
    said = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready(model),
        "unknown model ready": failure(lambda: client.is_model_ready("nobody")),
        "server": _field(client.get_server_metadata(), "name"),
        "version": version,
        "input": _field(inputs[0], "name"),
        "infer": _text(infer(picture).as_numpy("class_id")),
        "infer of a version": _text(infer(picture, model_version=version).as_numpy("class_id")),
        "infer of octets": _text(client.infer(model, [octets]).as_numpy("class_id")),
        "class name": _text(few.as_numpy("class_name")),
        "probability": float(few.as_numpy("probability")[0]),
        "not asked for": few.as_numpy("class_id") is None,
        "error": failure(lambda: infer(b"no picture")),
        "unknown model": failure(lambda: infer(picture, "nobody")),
    }
    client.close()
    return said


def _field(of: Any, name: str) -> Any:
    return of[name] if isinstance(of, dict) else getattr(of, name)


def _text(values: Any) -> str:
    value = values.flatten()[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def main() -> None:
    """Asks once."""
    which, address, grpc_address, model, picture = sys.argv[1:]
    content = Path(picture).read_bytes()
    if which == "kserve":
        said = asyncio.run(kserve(address, grpc_address, model, content))
    else:
        said = triton(address, grpc_address, model, content)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
