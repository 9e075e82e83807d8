"""List the container's HTTP paths: those of TorchServe, KServe, SageMaker and Vertex AI.

nginx itself responds to requests for readiness and metadata, which are constant or depend on a
file. It passes images to TorchServe.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.container.serving import ConfigError, Model
from scripts.gateway.template import HUGGING_FACE, Route

SERVER = {"name": "torchserve", "version": "0.12.0", "extensions": ["binary_tensor_data"]}
# A test compares these with handler/protocols/kserve_v2.py, which is in the archive.
INPUTS = {"images": "BYTES"}
OUTPUTS = {
    "class_id": "BYTES",
    "class_name": "BYTES",
    "probability": "FP32",
    "recognized": "BOOL",
    "labels": "BYTES",
    "result": "BYTES",
}
_ONLY_MULTILABEL = {"labels"}
_UPLOAD = ("POST", "PUT")
# Paths in nginx's template: health checks, and others.
_HEALTH_PATHS = ("/ping", "/live")
_OTHER_PATHS = ("/error", "/sized", "/chunked", "/openapi.json", "/docs")
# Characters that need no quotes in nginx.conf.
_PATH = re.compile(r"/[A-Za-z0-9_.~:@/-]{0,500}")


def list_routes(models: Sequence[Model], environment: Mapping[str, str]) -> list[Route]:
    """Return the paths; for all others nginx returns 404.

    Args:
        models: the served models; the first is the default for requests without a name.
        environment: the variables; `AIP_HEALTH_ROUTE` and `AIP_PREDICT_ROUTE` add paths.

    Raises:
        ConfigError: one of these paths is invalid or already has another use.
    """
    names = {"models": [model.name for model in models]}
    default = f"/predictions/{models[0].name}"
    found = [
        _constant("/", {"status": "alive"}),
        _constant("/v1/models", names),
        _constant("/v2", SERVER),
        _constant("/v2/health/live", {"live": True}),
        _readiness("/v2/health/ready"),
        _constant("/v2/models", names),
        _upload("/invocations"),
        # The gateway's path, which appears in error messages.
        _upload("/predict", default),
    ]
    for model in models:
        found += _model_routes(model)
    # Two versions of a model share paths.
    routes = {route.path: route for route in found}
    for variable, template_paths, route in (
        ("AIP_HEALTH_ROUTE", _HEALTH_PATHS, _readiness(environment.get("AIP_HEALTH_ROUTE", ""))),
        ("AIP_PREDICT_ROUTE", (), _upload(environment.get("AIP_PREDICT_ROUTE", ""), default)),
    ):
        path, same = route.path, routes.get(route.path)
        if not path or path in template_paths or (same and _same_use(same, route)):
            continue
        if not _PATH.fullmatch(path):
            raise ConfigError(f"{variable} must be a path such as /health, got {path[:200]!r}.")
        if same or path in (*_HEALTH_PATHS, *_OTHER_PATHS):
            raise ConfigError(
                f"{variable} is {path}, which has another use here. Choose another path."
            )
        routes[path] = route
    return list(routes.values())


def _same_use(one: Route, other: Route) -> bool:
    return (one.answer is None, one.needs_ready) == (other.answer is None, other.needs_ready)


def _model_routes(model: Model) -> list[Route]:
    name, v2 = model.name, f"/v2/models/{model.name}"
    found = [
        _readiness(f"/v1/models/{name}", name),
        _upload(f"/v1/models/{name}:predict"),
        _upload(f"/v1/models/{name}:explain"),
        _upload(f"/{name}/predict"),
        Route(f"/{HUGGING_FACE}/{name}", f"/predictions/{name}", _UPLOAD, HUGGING_FACE),
    ]
    for path in (name, f"{name}/{model.version}"):
        # GET returns the web UI.
        found.append(Route(f"/predictions/{path}", methods=("GET", "HEAD", *_UPLOAD)))
        found.append(_upload(f"/explanations/{path}"))
    for path in (v2, f"{v2}/versions/{model.version}"):
        found += [
            _constant(path, metadata(model)),
            _readiness(f"{path}/ready", name),
            _upload(f"{path}/infer", f"{v2}/infer"),
            _upload(f"{path}/explain", f"{v2}/explain"),
        ]
    return found


def metadata(model: Model) -> dict[str, Any]:
    """Return a model's metadata in the Open Inference Protocol; -1 means any number of images."""
    absent = set() if model.multilabel else _ONLY_MULTILABEL
    inputs, outputs = (
        [{"name": n, "datatype": kind, "shape": [-1]} for n, kind in tensors.items()]
        for tensors in (INPUTS, {n: kind for n, kind in OUTPUTS.items() if n not in absent})
    )
    about = {"name": model.name, "versions": [model.version], "platform": "torchserve"}
    return {**about, "inputs": inputs, "outputs": outputs}


def _constant(path: str, body: Mapping[str, Any]) -> Route:
    return Route(path, answer=_text(body))


def _readiness(path: str, model: str | None = None) -> Route:
    """Return a path that reports whether each model has a ready worker."""
    named = {} if model is None else {"name": model}
    ready, unready = (_text({**named, "ready": value}) for value in (True, False))
    return Route(path, answer=ready, needs_ready=True, unready=unready)


def _upload(path: str, target: str = "") -> Route:
    return Route(path, target, _UPLOAD)


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))
