"""nginx's configuration and the sign-in pages, filled in from the templates beside this file."""

import base64
import functools
import hashlib
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from handler.settings import MAX_REQUEST_BYTES
from scripts.gateway.gateway import Gateway, Node, Options
from scripts.gateway.keys import SESSION_SECONDS
from scripts.gateway.waiting import HOLD
from scripts.serve.management import PIXEL
from scripts.serve.running import HOST, find_running
from scripts.terminal import UserError

TEMPLATES = Path(__file__).parent
SIGN_IN_PAGE = "sign-in.html.jinja"
# Attempts at a request that failed within so many seconds. Killing a single node's worker whenever
# it was back cost one attempt of three its answer.
_TRIES = 6
_QUICK_FAILURE = 5
# Wrong keys of one address: so many a second for long, and so many at once.
_WRONG_KEYS = {"rate": 1, "burst": 20}


def is_loopback(options: Options) -> bool:
    """Whether only this machine can reach the gateway.

    Raises:
        UserError: an address is none.
    """
    for name in ("host", "published", "metrics_host"):
        address = getattr(options, name)
        try:
            if address or name == "host":
                ipaddress.ip_address(address)
        except ValueError as error:
            raise UserError(f"{name.upper()} must be an IP address, got {address!r}.") from error
    return ipaddress.ip_address(options.published or options.host).is_loopback


def config(gateway: Gateway, folder: Path) -> str:
    """The text of nginx.conf.

    Raises:
        UserError: nothing would be left to serve, or the nodes serve different models.
    """
    options = gateway.options
    everyone = [_upstream(node, gateway.sockets) for node in gateway.nodes]
    willing = [
        upstream
        for node, upstream in zip(gateway.nodes, everyone, strict=True)
        if upstream and not node.drained
    ]
    able = [
        upstream
        for node, upstream in zip(gateway.nodes, everyone, strict=True)
        if upstream and not node.drained and node.healthy
    ]
    models = {Path(node.archive).stem for node in gateway.nodes}
    if len(models) > 1:
        raise UserError(f"All nodes must serve the same model, these serve {', '.join(models)}.")
    (model,) = models
    serving = able or willing  # where none looks healthy, each may still be lucky
    if not serving:
        raise UserError("No node would be left to serve. Add one first.")
    return _template("nginx.conf.jinja").render(
        as_root=os.geteuid() == 0,
        folder=folder.resolve(),
        sockets=gateway.sockets,
        options=options,
        loopback=is_loopback(options),
        clients=[
            {"name": key.name, "key": key.key, "sessions": key.sessions(gateway.secret)}
            for key in gateway.keys
        ],
        all=[upstream for upstream in everyone if upstream],
        serving=serving,
        tries=_TRIES,
        quick_failure=_QUICK_FAILURE,
        hold=round(HOLD),
        wrong_keys=_WRONG_KEYS,
        max_request_bytes=MAX_REQUEST_BYTES,
        session_seconds=SESSION_SECONDS,
        policy=_policy(_style()),
        routes=routes(model),
        model=model,
        pixel=base64.b64encode(PIXEL).decode(),
    )


@functools.cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  # no HTML, or nothing of others' in it
    )
    return environment.get_template(name)


def _style() -> str:
    return (TEMPLATES / "sign-in.css").read_text()


def _policy(style: str) -> str:
    """The Content-Security-Policy of the sign-in page: its own style, its own form, no script."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )


def write_sign_in_pages(folder: Path) -> None:
    """Writes the pages on which people give their keys."""
    for name, refused in (("sign-in.html", False), ("sign-in-refused.html", True)):
        page = _template(SIGN_IN_PAGE).render(
            style=_style(), refused=refused, hours=SESSION_SECONDS // 3600
        )
        (folder / name).write_text(page)


def routes(model: str) -> tuple[tuple[str, str, str], ...]:
    """Address, what it is on a node, methods. Nothing else of TorchServe can be reached."""
    return (
        # The page, and what the plain form of a page of one's own sends to its own address.
        ("/", f"/predictions/{model}", "GET|HEAD|POST"),
        # On this address of TorchServe's, and only there, a query reaches the handler.
        ("/predict", f"/{model}/predict", "POST|PUT"),
        ("/explain", f"/explanations/{model}", "POST|PUT"),
        (f"/predictions/{model}", f"/predictions/{model}", "GET|HEAD|POST|PUT"),
        (f"/explanations/{model}", f"/explanations/{model}", "POST|PUT"),
        # KServe's own, versions 1 and 2.
        *((path, path, "POST") for path in _kserve(model)),
    )


def _kserve(model: str) -> Iterator[str]:
    for verb in ("predict", "explain"):
        yield f"/v1/models/{model}:{verb}"
    for verb in ("infer", "explain"):
        yield f"/v2/models/{model}/{verb}"


def _upstream(node: Node, sockets: str) -> dict[str, str] | None:
    """What the template needs of a node; None where it does not run, or only begins to."""
    if node.address:
        return _described(node, sockets, node.address, "")
    running = find_running(Path(node.run_dir))
    if running is None:
        return None
    try:
        authorization = running.authorization("inference").get("Authorization", "")
    except (OSError, ValueError):
        return None  # its file of tokens is not there or not whole yet
    return _described(node, sockets, f"{HOST}:{running.ports.inference}", authorization)


def _described(node: Node, sockets: str, address: str, authorization: str) -> dict[str, str]:
    # After a reload the old processes of nginx take connections for a moment still. They must not
    # get those of the new ones: what they would send to this node is an old port or a void token.
    current = hashlib.sha256(f"{address} {authorization}".encode()).hexdigest()[:8]
    return {
        "name": node.name,
        "address": address,
        "authorization": authorization,
        "socket": f"{sockets}/{node.name}.{current}.sock",
    }
