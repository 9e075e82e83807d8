"""Makes `podmonitor.json` from the resource definition that Prometheus Operator publishes.

    python deploy/schemas/crd.py monitoring.coreos.com_podmonitors.yaml

The file is in its repository at example/prometheus-operator-crd. Texts for people are left out, and
what an object does not list may not stand in it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    """Writes the schema beside this file."""
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    version = definition["metadata"]["annotations"]["operator.prometheus.io/version"]
    (v1,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = _strict(v1["schema"]["openAPIV3Schema"])
    # Kubernetes' own.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    text = {
        "source": f"prometheus-operator {version}, Apache-2.0, The prometheus-operator Authors",
        "schema": schema,
    }
    (Path(__file__).parent / "podmonitor.json").write_text(json.dumps(text, indent=1) + "\n")


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "properties" in schema:
        properties = {name: _strict(part) for name, part in schema["properties"].items()}
        rest = {key: part for key, part in schema.items() if key != "properties"}
        return {**_strict(rest), "properties": properties, "additionalProperties": False}
    return {key: _strict(part) for key, part in schema.items() if key != "description"}


if __name__ == "__main__":
    main()
