"""Create a schema from a custom resource definition that an operator publishes.

    python deploy/schemas/crd.py monitoring.coreos.com_podmonitors.yaml
    python deploy/schemas/crd.py ray.io_rayjobs.yaml 1.7.0

The first file is in Prometheus Operator's repository at example/prometheus-operator-crd and becomes
`podmonitor.json`. The second one is in KubeRay's at helm-chart/kuberay-operator/crds, does not
contain its version, and becomes `rayjob.json`. Descriptions are removed, and properties that the
definition does not list are not allowed. `kubernetes-validate` checks the pods.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

# Definition to the schema's name and the project that publishes it.
_KNOWN = {
    "podmonitors.monitoring.coreos.com": ("podmonitor", "prometheus-operator"),
    "rayjobs.ray.io": ("rayjob", "KubeRay"),
}
_PODS = {"template", "submitterPodTemplate"}


def main() -> None:
    """Write the schema to this file's folder."""
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    name, project = _KNOWN[definition["metadata"]["name"]]
    annotations = definition["metadata"]["annotations"]
    version = annotations.get("operator.prometheus.io/version") or sys.argv[2]
    (v1,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = _strict(v1["schema"]["openAPIV3Schema"])
    # The metadata is defined by Kubernetes.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    text = {
        "source": f"{project} {version}, Apache-2.0, The {project} Authors",
        "schema": schema,
    }
    (Path(__file__).parent / f"{name}.json").write_text(json.dumps(text, indent=1) + "\n")


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "properties" in schema:
        properties = {
            name: {"type": "object"} if name in _PODS else _strict(part)
            for name, part in schema["properties"].items()
        }
        rest = {key: part for key, part in schema.items() if key != "properties"}
        return {**_strict(rest), "properties": properties, "additionalProperties": False}
    return {key: _strict(part) for key, part in schema.items() if key != "description"}


if __name__ == "__main__":
    main()
