"""Create `kserve.json`, the schema of KServe's resources, from its published Python package.

    pip download --no-deps kserve==0.21.0
    python deploy/schemas/extract.py kserve-0.21.0-py3-none-any.whl

The package is generated from the same Go types as KServe's custom resource definitions and contains
the name and type of each property. It is parsed and not imported, since its dependencies conflict
with this project's. `kubernetes-validate` checks Kubernetes' own types.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

_ROOTS = ("V1beta1InferenceService", "V1alpha1ServingRuntime")
_PLAIN = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}


def main() -> None:
    """Write the schema to this file's folder."""
    wheel = Path(sys.argv[1])
    with zipfile.ZipFile(wheel) as package:
        sources = [
            package.read(name).decode()
            for name in package.namelist()
            if re.fullmatch(r"kserve/models/v1(alpha|beta)1_\w+\.py", name)
        ]
    classes = {
        node.name: node
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    definitions: dict[str, Any] = {}
    waiting = list(_ROOTS)
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            definitions[name] = _schema(classes[name], waiting, classes)
    text = {
        "source": f"{wheel.name}, Apache-2.0, The KServe Authors",
        "definitions": dict(sorted(definitions.items())),
    }
    target = Path(__file__).parent / "kserve.json"
    target.write_text(json.dumps(text, indent=1) + "\n")


def _schema(
    model: ast.ClassDef, waiting: list[str], classes: dict[str, ast.ClassDef]
) -> dict[str, Any]:
    types, names = _mapping(model, "openapi_types"), _mapping(model, "attribute_map")
    properties = {}
    for attribute, type_name in types.items():
        waiting.extend(found for found in re.findall(r"\w+", type_name) if found in classes)
        properties[names[attribute]] = _property(type_name, classes)
    return {
        "type": "object",
        "properties": properties,
        "required": [names[attribute] for attribute in _required(model)],
        "additionalProperties": False,
    }


def _mapping(model: ast.ClassDef, name: str) -> dict[str, str]:
    for node in model.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            values: dict[str, str] = ast.literal_eval(node.value)
            return values
    raise ValueError(f"{model.name} has no {name}")


def _required(model: ast.ClassDef) -> list[str]:
    """Return the required properties, for which the setters reject None."""
    refused = set(re.findall(r"and (\w+) is None", ast.unparse(model)))
    return sorted(refused & _mapping(model, "openapi_types").keys())


def _property(type_name: str, classes: dict[str, ast.ClassDef]) -> dict[str, Any]:
    if match := re.fullmatch(r"list\[(.+)\]", type_name):
        return {"type": "array", "items": _property(match[1], classes)}
    if match := re.fullmatch(r"dict\(str, (.+)\)", type_name):
        return {"type": "object", "additionalProperties": _property(match[1], classes)}
    if type_name in classes:
        return {"$ref": f"#/definitions/{type_name}"}
    return {"type": _PLAIN[type_name]} if type_name in _PLAIN else {"x-kubernetes": type_name}


if __name__ == "__main__":
    main()
