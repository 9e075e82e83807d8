"""`make gateway`, `gateway-reload`, `gateway-stop`, `upgrade` and `rollback`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from scripts.gateway import nginx
from scripts.gateway.nginx import GATEWAY_DIR
from scripts.gateway.options import Options, check
from scripts.gateway.upgrade import AGREEMENT, PREVIOUS, stop_second, upgrade
from scripts.serve.preflight import check_ports, warn_of_descriptors
from scripts.serve.running import RUN_DIR
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step, warn


def start_command(
    upstreams: Annotated[
        str, typer.Option(help="HOST:PORT of servers, separated by spaces.")
    ] = Options.upstreams,
    model: Annotated[str, typer.Option(help="Name of the model.")] = "",
    host: Annotated[str, typer.Option(help="IP address to listen on.")] = Options.host,
    http_port: int = Options.http_port,
    https_port: int = Options.https_port,
    keys: Annotated[str, typer.Option(help="File of API keys.")] = "",
    certificate: Annotated[str, typer.Option(help="PEM file.")] = "",
    certificate_key: Annotated[str, typer.Option(help="PEM file.")] = "",
    acme: Annotated[str, typer.Option(help="Folder of certbot --webroot.")] = "",
    rate: Annotated[
        int, typer.Option(help="Rate limit: requests per second of a client.")
    ] = Options.rate,
    burst: Annotated[int, typer.Option(help="Requests accepted above the rate.")] = Options.burst,
    connections: Annotated[
        int, typer.Option(help="Concurrent requests of a client.")
    ] = Options.connections,
    proxies: Annotated[str, typer.Option(help="Addresses of load balancers.")] = "",
    prefix: Annotated[str, typer.Option(help="Path behind a proxy, such as /classify.")] = "",
    keepalive: Annotated[
        int, typer.Option(help="Seconds an idle connection stays open.")
    ] = Options.keepalive,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for an answer.")] = Options.timeout,
    published: Annotated[str, typer.Option(help="Address of a container's ports.")] = "",
    log: Annotated[str, typer.Option(help="file, stdout or syslog.")] = Options.log,
    folder: Annotated[Path, typer.Option(help="For nginx's files.")] = GATEWAY_DIR,
    *,
    foreground: Annotated[bool, typer.Option(help="Run until SIGTERM or SIGQUIT.")] = False,
) -> None:
    """Put nginx in front of the running server, or of UPSTREAMS."""
    if nginx.find(folder) is not None:
        raise UserError("The gateway is running already. Stop it with: make gateway-stop")
    options = Options(
        host=host,
        published=published,
        http_port=http_port,
        https_port=https_port,
        certificate=certificate,
        certificate_key=certificate_key,
        acme=acme,
        keys=keys,
        rate=rate,
        burst=burst,
        connections=connections,
        proxies=proxies,
        prefix=prefix.rstrip("/"),
        keepalive=keepalive,
        timeout=timeout,
        upstreams=upstreams,
        model=model,
        log=log,
        foreground=foreground,
    )
    check(options)
    check_ports(host, {"http": http_port, "https": https_port})
    warn_of_descriptors()
    if not model:
        name = DEFAULT_ARCHITECTURE if upstreams else nginx.require_upstream(folder.parent).model
        options = dataclasses.replace(options, model=name)
    if foreground:
        nginx.prepare(options, folder)
        nginx.replace_process(folder)
    nginx.start(options, folder)
    _show(options)


def _show(options: Options) -> None:
    step(f"Gateway: nginx in front of {options.upstreams or 'this server'}, logs in {GATEWAY_DIR}")
    card = None if options.upstreams else read_card(MODEL_STORE / f"{options.model}.mar")
    if card is not None and card.warning:
        warn(card.warning)
    if not options.keys:
        warn("No API key is required, since only this machine can connect. KEYS=file changes that.")
    if options.is_loopback:
        console.print(f"Images       {options.url}/predict")
        console.print(f"Web UI       {options.url}/")
        console.print(f"HTTPS        {options.https_url}/")
        console.print(f"API          {options.url}/docs")
        console.print(f"Ready        {options.url.removesuffix(options.prefix)}/readyz")
    else:  # plain HTTP is redirected, except health checks
        url = f"https://YOUR-HOST:{options.https_port}{options.prefix}"
        console.print(f"Images       {url}/predict")
        console.print(f"Web UI       {url}/")
        console.print(f"API          {url}/docs")
        console.print(f"Ready        http://YOUR-HOST:{options.http_port}/readyz")


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
    archive: Annotated[
        Path | None,
        typer.Option(
            help="The new model archive; by default the served model's in the model store."
        ),
    ] = None,
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples whose label(s) must not change.")
    ] = AGREEMENT,
) -> None:
    """Serve another model archive with zero downtime."""
    model = nginx.require_upstream().model
    upgrade(archive or MODEL_STORE / f"{model}.mar", agreement)


def rollback_command() -> None:
    """Serve the archive that the last upgrade replaced."""
    found = sorted((RUN_DIR / PREVIOUS).glob("*.mar"))
    if not found:
        raise UserError("There is no previous archive: make upgrade has not run.")
    upgrade(found[0], agreement=0.0)
