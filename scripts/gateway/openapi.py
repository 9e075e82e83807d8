"""Write the description of the HTTP API, `openapi.yaml`, as files that nginx serves.

The container image uses this module too, so it has few imports.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

SOURCE = Path(__file__).with_name("openapi.yaml")
JSON = "openapi.json"
PAGE = "docs.html"

Server = Literal["server", "gateway", "container"]
Document = dict[str, Any]


def describe(server: Server, models: Sequence[str] = (), prefix: str = "") -> Document:
    """Return the description of one kind of server.

    Args:
        server: kind of server; only its paths are kept.
        models: names of its models; empty for any.
        prefix: URL path before each path.
    """
    # The loader in C takes a tenth of the time; PyYAML may have been built without it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: Document = yaml.load(SOURCE.read_text("utf-8"), loader)
    del document["x-shared"]
    document["servers"] = [{"url": prefix or "/"}]
    if models:
        document["components"]["parameters"]["model"]["schema"]["enum"] = [*models]
    types = document["components"]["schemas"]["ErrorType"]
    types["enum"] = [each["name"] for each in types["x-types"]]
    for path, item in list(document["paths"].items()):
        if server not in item.pop("x-served-by"):
            del document["paths"][path]
        for method, operation in list(item.items()):
            if isinstance(operation, dict) and server not in operation.pop("x-served-by", [server]):
                del item[method]
    return document


def write(folder: Path, document: Document) -> None:
    """Write the description into nginx's folder, as JSON and HTML."""
    (folder / JSON).write_text(json.dumps(document), "utf-8")
    (folder / PAGE).write_text(render_page(document), "utf-8")


def render_page(document: Document) -> str:
    """Return the description as HTML without scripts."""
    environment = Environment(
        loader=FileSystemLoader(SOURCE.parent),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters["text"] = _text
    template = environment.get_template("openapi.html.jinja")
    return template.render(document=document, operations=_operations(document))


def _operations(document: Document) -> dict[str, list[Document]]:
    """Return the operations by tag; methods of a path with the same summary are merged."""
    found: dict[str, list[Document]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        by_summary: dict[str, Document] = {}
        for method, operation in item.items():
            if method == "parameters":
                continue
            parameters = [*item.get("parameters", []), *operation.get("parameters", [])]
            first = by_summary.setdefault(
                operation["summary"],
                {"methods": [], "path": path, **operation, "parameters": parameters},
            )
            first["methods"].append(method.upper())
        for operation in by_summary.values():
            found[operation["tags"][0]].append(operation)
    return {tag: operations for tag, operations in found.items() if operations}


def _text(text: str) -> Markup:
    """Convert a text to HTML, with code in backticks as `<code>`."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@functools.cache
def content_security_policy() -> str:
    """Return the page's Content-Security-Policy, which allows only its own style, by hash."""
    template = SOURCE.with_name("openapi.html.jinja").read_text("utf-8")
    (style,) = re.findall("<style>(.*?)</style>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
