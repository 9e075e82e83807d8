"""The manifests as kubectl and kustomize render them, and their published schemas."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERNETES = Path("deploy/kubernetes")
_VERSION = "1.30"
# See `deploy/schemas/extract.py`; Kubernetes' own are in a package.
_SCHEMAS = {
    "serving.kserve.io": "kserve",
    "ray.io": "rayjob",
    "monitoring.coreos.com": "podmonitor",
}

Manifest = dict[str, Any]


@cache
def _text(path: Path) -> str:
    if path.is_file():
        return path.read_text()
    if shutil.which("kubectl") is None:
        pytest.skip("NOT RUN: kubectl is missing")
    command = ["kubectl", "kustomize", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return done.stdout


def manifests(path: Path) -> list[Manifest]:
    """Return the manifests of a file or of a folder for kustomize."""
    return list(yaml.safe_load_all(_text(path)))


def overlay(name: str) -> dict[tuple[str, str], Manifest]:
    """Return the manifests of an overlay by kind and name."""
    objects = manifests(KUBERNETES / "overlays" / name)
    found = {(m["kind"], m["metadata"]["name"]): m for m in objects}
    assert len(found) == len(objects)
    return found


def template(overlay_name: str = "cpu", deployment: str = "densenet") -> Manifest:
    """Return the pod template of a Deployment."""
    found: Manifest = overlay(overlay_name)["Deployment", deployment]["spec"]["template"]
    return found


def validate(manifest: Manifest) -> None:
    """Raise `jsonschema.ValidationError` if a manifest does not fit the schema of its kind."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group not in _SCHEMAS:
        kubernetes_validate.validate(manifest, _VERSION, strict=True)
        return
    schema = json.loads(Path(f"deploy/schemas/{_SCHEMAS[group]}.json").read_text())
    of_kind = {"$ref": f"#/definitions/{version.capitalize()}{manifest['kind']}", **schema}
    jsonschema.Draft7Validator(schema.get("schema", of_kind)).validate(manifest)
