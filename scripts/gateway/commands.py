"""`make gateway`, `gateway-reload`, `gateway-stop`, `upgrade` and `rollback`."""

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from scripts.gateway import nginx
from scripts.gateway.nginx import GATEWAY_DIR
from scripts.gateway.options import Options, check
from scripts.gateway.upgrade import AGREEMENT, PREVIOUS, stop_second, upgrade
from scripts.serve.preflight import check_ports, warn_of_descriptors
from scripts.serve.running import RUN_DIR, require_running
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step, warn

_ARCHIVE = "The new model archive; by default the served model's in the model store."


def start_command(folder: Path = GATEWAY_DIR, **values: Any) -> None:
    """Put nginx in front of the running server, or of UPSTREAMS."""
    if nginx.find(folder) is not None:
        raise UserError("The gateway is running already. Stop it with: make gateway-stop")
    options = Options(**values)
    options = dataclasses.replace(options, prefix=options.prefix.rstrip("/"))
    check(options)
    check_ports(options.host, {"http": options.http_port, "https": options.https_port})
    warn_of_descriptors()
    if not options.model:
        served = None if options.upstreams else nginx.require_upstream(folder.parent)
        model = DEFAULT_ARCHITECTURE if served is None else served.model
        options = dataclasses.replace(options, model=model)
    nginx.start(options, folder)
    _show(options)


_FOLDER = inspect.Parameter(
    "folder",
    inspect.Parameter.KEYWORD_ONLY,
    default=GATEWAY_DIR,
    annotation=Annotated[Path, typer.Option(help="For nginx's files.")],
)
# Typer reads the options from this signature: the fields of Options, and the folder.
start_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*inspect.signature(Options).parameters.values(), _FOLDER]
)


def _show(options: Options) -> None:
    step(f"Gateway: nginx in front of {options.upstreams or 'this server'}, logs in {GATEWAY_DIR}")
    card = None if options.upstreams else read_card(MODEL_STORE / f"{options.model}.mar")
    if card is not None and card.warning:
        warn(card.warning)
    if not options.keys:
        warn("No API key is required, since only this machine can connect. KEYS=file changes that.")
    host = options.address if options.is_loopback else "YOUR-HOST"
    http = f"http://{host}:{options.http_port}"
    https = f"https://{host}:{options.https_port}{options.prefix}"
    # Beyond loopback, plain HTTP is redirected, except health checks.
    url = http + options.prefix if options.is_loopback else https
    console.print(f"Images       {url}/predict")
    console.print(f"Web UI       {url}/")
    if options.is_loopback:
        console.print(f"HTTPS        {https}/")
    console.print(f"API          {url}/docs")
    console.print(f"Ready        {http}/readyz")


def reload_command(folder: Path = GATEWAY_DIR) -> None:
    """Apply changed API keys and certificates."""
    with nginx.lock(folder):
        options = nginx.read_options(folder)
        check(options)
        nginx.reload(options, folder)
    step("Gateway: reloaded")


def stop_command(folder: Path = GATEWAY_DIR) -> None:
    """Drain requests in flight, then stop the gateway."""
    with nginx.lock(folder), Status("Stopping the gateway ...", console=console):
        stopped = nginx.stop(folder)
        stop_second(folder.parent)
    step("Gateway: stopped" if stopped else "Gateway: not running")


def upgrade_command(
    archive: Annotated[Path | None, typer.Option(help=_ARCHIVE)] = None,
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples whose label(s) must not change.")
    ] = AGREEMENT,
) -> None:
    """Serve another model archive with zero downtime."""
    model = require_running().model
    with nginx.lock():
        upgrade(archive or MODEL_STORE / f"{model}.mar", agreement)


def rollback_command() -> None:
    """Serve the archive that the last upgrade replaced."""
    found = sorted((RUN_DIR / PREVIOUS).glob("*.mar"))
    if not found:
        raise UserError("There is no previous archive: make upgrade has not run.")
    with nginx.lock():
        upgrade(found[0], agreement=0.0)
