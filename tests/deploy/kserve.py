"""KServe's published types as JSON schemas, see `deploy/schemas/extract.py`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

_KINDS = {
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
}


@cache
def _definitions() -> dict[str, Any]:
    schema = json.loads(Path("deploy/schemas/kserve.json").read_text())
    definitions: dict[str, Any] = schema["definitions"]
    return definitions


def validate(manifest: dict[str, Any]) -> None:
    """Raises `jsonschema.ValidationError` where a manifest does not fit.

    Raises:
        KeyError: it is of no kind that is known here.
    """
    name = _KINDS[manifest["apiVersion"], manifest["kind"]]
    schema = {"$ref": f"#/definitions/{name}", "definitions": _definitions()}
    jsonschema.Draft7Validator(schema).validate(manifest)
