"""Create `kserve.json`, the schema of KServe's resources, from its published Python package.

    uv run --no-project --with kserve==0.21.0 deploy/schemas/extract.py

The package is generated from the same Go types as KServe's custom resource definitions and contains
the name and type of each property. `kubernetes-validate` checks Kubernetes' own types.
"""

import inspect
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kserve import models

_PLAIN = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}


def main() -> None:
    """Write the schema to this file's folder."""
    definitions: dict[str, Any] = {}
    waiting = ["V1beta1InferenceService", "V1alpha1ServingRuntime"]
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            model = getattr(models, name)
            definitions[name] = _schema(model)
            types = re.findall(r"\w+", " ".join(model.openapi_types.values()))
            waiting.extend(found for found in types if hasattr(models, found))
    wheel = f"kserve-{version('kserve')}-py3-none-any.whl"
    text = {
        "source": f"{wheel}, Apache-2.0, The KServe Authors",
        "definitions": dict(sorted(definitions.items())),
    }
    target = Path(__file__).parent / "kserve.json"
    target.write_text(json.dumps(text, indent=1) + "\n")


def _schema(model: Any) -> dict[str, Any]:
    names = model.attribute_map
    # The setters of required properties reject None.
    required = set(re.findall(r"and (\w+) is None", inspect.getsource(model))) & names.keys()
    return {
        "type": "object",
        "properties": {names[key]: _property(kind) for key, kind in model.openapi_types.items()},
        "required": [names[key] for key in sorted(required)],
        "additionalProperties": False,
    }


def _property(kind: str) -> dict[str, Any]:
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        return {"type": "array", "items": _property(match[1])}
    if match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return {"type": "object", "additionalProperties": _property(match[1])}
    if hasattr(models, kind):
        return {"$ref": f"#/definitions/{kind}"}
    return {"type": _PLAIN[kind]} if kind in _PLAIN else {"x-kubernetes": kind}


if __name__ == "__main__":
    main()
