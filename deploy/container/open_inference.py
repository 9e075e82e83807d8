"""KServe's addresses, most of which TorchServe's frontend lacks, as nginx's locations.

What they answer is known when the container starts, but for whether it is ready. What holds
pictures goes on to TorchServe, whose handler answers it.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

SERVER = {"name": "torchserve", "version": "0.12.0", "extensions": ["binary_tensor_data"]}

# As handler/kserve.py in the archive has them, which a test compares.
INPUTS = {"images": "BYTES"}
OUTPUTS = {
    "class_id": "BYTES",
    "class_name": "BYTES",
    "probability": "FP32",
    "recognized": "BOOL",
    "labels": "BYTES",
    "result": "BYTES",
}
# Only of a model that gives several labels a picture.
_OF_SEVERAL = "labels"


_MESSAGE = "There is no such model, version or address here."
_NOT_FOUND = {
    "success": False,
    "code": 404,
    "type": "NotFound",
    "message": _MESSAGE,
    "error": _MESSAGE,
}


def metadata(model: str, version: str, *, multilabel: bool = False) -> dict[str, Any]:
    """A model's, as the Open Inference Protocol has it; -1 stands for any number of pictures."""
    outputs = {n: kind for n, kind in OUTPUTS.items() if multilabel or n != _OF_SEVERAL}
    return {
        "name": model,
        "versions": [version],
        "platform": "torchserve",
        "inputs": _tensors(INPUTS),
        "outputs": _tensors(outputs),
    }


def _tensors(tensors: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": n, "datatype": datatype, "shape": [-1]} for n, datatype in tensors.items()]


def addresses(models: Mapping[str, str], multilabel: Collection[str] = ()) -> dict[str, str]:
    """Address to what nginx does there.

    Args:
        models: the name and version of each.
        multilabel: the names of those that give several labels a picture.
    """
    found = {
        "/": answer({"status": "alive"}),
        "/v1/models": answer({"models": list(models)}),
        "/v2": answer(SERVER),
        "/v2/health/live": answer({"live": True}),
        "/v2/health/ready": readiness(),
        "/v2/models": answer({"models": list(models)}),
        "/v1/": answer(_NOT_FOUND, 404),
        "/v2/": answer(_NOT_FOUND, 404),
    }
    for model, version in models.items():
        plain, versioned = f"/v2/models/{model}", f"/v2/models/{model}/versions/{version}"
        found[f"/v1/models/{model}"] = readiness(model)
        for verb in ("predict", "explain"):
            found[f"/v1/models/{model}:{verb}"] = passed_on(f"/v1/models/{model}:{verb}")
        for path in (plain, versioned):
            found[path] = answer(metadata(model, version, multilabel=model in multilabel))
            found[f"{path}/ready"] = readiness(model)
            for verb in ("infer", "explain"):
                found[f"{path}/{verb}"] = passed_on(f"{plain}/{verb}")
    return found


def locations(found: Mapping[str, str]) -> str:
    """The text for nginx.conf; what stands between @ signs is filled in there."""
    # Whatever is below an address that ends with a slash and not named itself.
    modifiers = {path: "" if path.endswith("/") and path != "/" else "= " for path in found}
    return "".join(
        f"    location {modifiers[path]}{path} {{{body}    }}\n" for path, body in found.items()
    )


def answer(body: Mapping[str, Any], status: int = 200) -> str:
    """What always says the same."""
    return f"""
      access_log off;
      return {status} '{_text(body)}';
"""


def readiness(model: str | None = None) -> str:
    """What says whether every model has a worker that is ready."""
    named = {} if model is None else {"name": model}
    return f"""
      access_log off;
      if (!-f @READY@) {{
        return 503 '{_text({**named, "ready": False})}';
      }}
      return 200 '{_text({**named, "ready": True})}';
"""


def passed_on(target: str) -> str:
    """What is at another address of TorchServe's, within the limits of all requests."""
    return f"""
      limit_conn all @REQUESTS@;
      limit_conn large @LARGE@;
      proxy_pass http://127.0.0.1:@TORCHSERVE_PORT@{target}$is_args$args;
"""


def _text(body: Mapping[str, Any]) -> str:
    """JSON between nginx's single quotes; the names in it are words."""
    return json.dumps(body, separators=(",", ":")) + "\\n"
