"""Call a server with the client of KServe or of Triton, and print the results as JSON.

It runs in its own environment, see requirements/clients.in:

    python ask.py kserve|triton ADDRESS GRPC_ADDRESS MODEL IMAGE

Addresses are HOST:PORT.
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
    """Return the error of a call."""
    try:
        return f"no error, but {call()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def afailure(call: Any) -> str:
    """Return the error of an awaited call."""
    try:
        return f"no error, but {await call!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def kserve(address: str, grpc_address: str, model: str, image: bytes) -> dict[str, Any]:
    """Call both of KServe's clients, over both versions of its protocol."""
    from kserve import (
        InferenceGRPCClient,
        InferenceRESTClient,
        InferInput,
        InferRequest,
        RESTConfig,
    )

    url = f"http://{address}"
    found: dict[str, Any] = {}
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", timeout=60))
    body = {"instances": [{"b64": base64.b64encode(image).decode()}]}
    found["v1 live"] = await v1.is_server_live(url)
    found["v1 model ready"] = await v1.is_model_ready(url, model)
    found["v1 unknown model"] = await afailure(v1.is_model_ready(url, "nobody"))
    found["v1 predict"] = (await v1.infer(url, body, model_name=model))["predictions"][0][
        "class_id"
    ]
    found["v1 explain"] = (await v1.explain(url, model, body))["explanations"][0]["class_id"]
    not_an_image = {"instances": [{"b64": "bm8gaW1hZ2U="}]}
    found["v1 error"] = await afailure(v1.infer(url, not_an_image, model_name=model))
    await v1.close()

    def request(content: bytes) -> Any:
        tensor = InferInput("images", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([content], object))
        return InferRequest(model, [tensor], request_id="42")

    v2 = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    found["v2 live"] = await v2.is_server_live(url)
    found["v2 ready"] = await v2.is_server_ready(url)
    found["v2 model ready"] = await v2.is_model_ready(url, model)
    found["v2 unknown model ready"] = await v2.is_model_ready(url, "nobody")
    answer = await v2.infer(url, request(image), model_name=model)
    found["v2 infer"] = _text(answer.outputs[0].as_numpy())
    found["v2 id"] = answer.id
    await v2.close()

    client = InferenceGRPCClient(grpc_address, retries=0)
    found["grpc live"] = await client.is_server_live()
    found["grpc ready"] = await client.is_server_ready()
    found["grpc model ready"] = await client.is_model_ready(model)
    answer = await client.infer(request(image))
    found["grpc infer"] = _text(answer.outputs[0].as_numpy())
    found["grpc id"] = answer.id
    found["grpc unknown model"] = await afailure(client.is_model_ready("nobody"))
    found["grpc error"] = await afailure(client.infer(request(b"no image")))
    await client.close()
    return found


def triton(address: str, grpc_address: str, model: str, image: bytes) -> dict[str, Any]:
    """Call Triton's clients over HTTP and gRPC."""
    import tritonclient.grpc
    import tritonclient.http

    client: Any = tritonclient.http.InferenceServerClient(address)
    found = _triton(tritonclient.http, client, model, image)
    client = tritonclient.grpc.InferenceServerClient(grpc_address)
    over_grpc = _triton(tritonclient.grpc, client, model, image)
    return found | {f"grpc {name}": value for name, value in over_grpc.items()}


def _triton(module: Any, client: Any, model: str, image: bytes) -> dict[str, Any]:
    def infer(content: bytes, name: str = model, **options: Any) -> Any:
        tensor = module.InferInput("images", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([content], object))
        return client.infer(name, [tensor], **options)

    octets = module.InferInput("images", [len(image)], "UINT8")
    octets.set_data_from_numpy(np.frombuffer(image, np.uint8))
    metadata = client.get_model_metadata(model)
    version = metadata["versions"][0] if isinstance(metadata, dict) else metadata.versions[0]
    inputs = metadata["inputs"] if isinstance(metadata, dict) else metadata.inputs
    wanted = [module.InferRequestedOutput("class_name"), module.InferRequestedOutput("probability")]
    few = infer(image, outputs=wanted, request_id="42")
    found = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready(model),
        "unknown model ready": failure(lambda: client.is_model_ready("nobody")),
        "server": _field(client.get_server_metadata(), "name"),
        "version": version,
        "input": _field(inputs[0], "name"),
        "infer": _text(infer(image).as_numpy("class_id")),
        "infer of a version": _text(infer(image, model_version=version).as_numpy("class_id")),
        "infer of octets": _text(client.infer(model, [octets]).as_numpy("class_id")),
        "class name": _text(few.as_numpy("class_name")),
        "probability": float(few.as_numpy("probability")[0]),
        "not asked for": few.as_numpy("class_id") is None,
        "error": failure(lambda: infer(b"no image")),
        "unknown model": failure(lambda: infer(image, "nobody")),
    }
    client.close()
    return found


def _field(of: Any, name: str) -> Any:
    return of[name] if isinstance(of, dict) else getattr(of, name)


def _text(values: Any) -> str:
    value = values.flatten()[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def main() -> None:
    """Call the server once."""
    which, address, grpc_address, model, image = sys.argv[1:]
    content = Path(image).read_bytes()
    if which == "kserve":
        found = asyncio.run(kserve(address, grpc_address, model, content))
    else:
        found = triton(address, grpc_address, model, content)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
