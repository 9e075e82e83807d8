"""Render the gateway's nginx.conf from its options."""

import base64
import ipaddress
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib

from scripts.gateway.options import Options, read_upstreams
from scripts.gateway.template import HUGGING_FACE, Route, has_ipv6, render_template
from scripts.serve.management import PIXEL
from scripts.serve.running import HOST

# Requests with a wrong key per address: rate per second, and burst.
_WRONG_KEYS = {"wrong_keys_rate": 1, "wrong_keys_burst": 20}
# Seconds that slow clients have to receive their responses after a reload.
DRAIN_SECONDS = 90
# Concurrent requests of 1 MB or more, per upstream: 64 of 20 MB take 2.6 GB in the frontend.
_MAX_LARGE = 64
# nginx's processes only forward bytes. In a container, `auto` would count the host's CPUs.
_MAX_PROCESSES = 4
_RESOLV_CONF = Path("/etc/resolv.conf")


def render(options: Options, folder: Path, upstreams: Sequence[tuple[str, int]]) -> str:
    """Return the gateway's nginx.conf.

    Args:
        options: the gateway's options, including `model`.
        folder: the folder of nginx's files.
        upstreams: hosts and ports of TorchServe. A single host name stands for all its addresses
            and is resolved again when they change.
    """
    folder = folder.resolve()
    certificate, key = (
        (Path(options.certificate).resolve(), Path(options.certificate_key).resolve())
        if options.certificate
        else _self_signed(folder)
    )
    addresses = [options.address]
    if options.host == HOST and has_ipv6():
        addresses.append("[::1]")  # some clients resolve localhost to it
    listeners = [
        {"address": address, "port": port, "tls": tls}
        for address in addresses
        for port, tls in ((options.http_port, False), (options.https_port, True))
    ]
    return render_template(
        folder=folder,
        foreground=options.foreground,
        processes=min(joblib.cpu_count(), _MAX_PROCESSES),
        worker_connections=4000,
        drain_seconds=DRAIN_SECONDS,
        proxies=options.proxies.split(),
        keys=options.read_keys(),
        limits={
            "rate": options.rate,
            "burst": options.burst,
            "connections": options.connections,
            "large": _MAX_LARGE * len(upstreams),
            **_WRONG_KEYS,
        },
        keepalive=options.keepalive,
        timeout=options.timeout,
        prefix=options.prefix,
        servers=[f"{host}:{port}" for host, port in upstreams],
        dns=_dns(upstreams),
        listeners=listeners,
        tls={"certificate": certificate, "key": key},
        redirect_port=0 if options.is_loopback else options.https_port,
        acme=Path(options.acme).resolve() if options.acme else None,
        probe={
            "pixel": base64.b64encode(PIXEL).decode(),
            "path": f"/predictions/{options.model}",
        },
        routes=[*routes(options.model, options.prefix)],
        **_logs(options.log, folder),
    )


def _self_signed(folder: Path) -> tuple[Path, Path]:
    """Return a self-signed certificate for localhost and its key; create missing ones."""
    certificate, key = folder / "certificate.pem", folder / "certificate.key"
    if not (certificate.exists() and key.exists()):
        key.touch(mode=0o600)
        command = (
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "90", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        )
        subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def routes(model: str, prefix: str = "") -> list[Route]:
    """Return the gateway's routes; no other paths of TorchServe are reachable."""
    upload = ("POST", "PUT")
    found = [
        # The web UI, and HTML forms without an action, which are posted to the same path.
        Route("/", f"/predictions/{model}", ("GET", "HEAD", "POST")),
        Route("/predict", f"/predictions/{model}", upload),
        Route("/explain", f"/explanations/{model}", upload),
        Route(f"/predictions/{model}", f"/predictions/{model}", ("GET", "HEAD", *upload)),
        Route(f"/explanations/{model}", f"/explanations/{model}", upload),
    ]
    for verb in ("predict", "explain"):
        path = f"/v1/models/{model}:{verb}"
        found.append(Route(path, path, ("POST",)))
    for verb in ("infer", "explain"):
        path = f"/v2/models/{model}/{verb}"
        found.append(Route(path, path, ("POST",)))
    found.append(
        Route(f"/{HUGGING_FACE}/{model}", f"/predictions/{model}", ("POST",), HUGGING_FACE)
    )
    return [replace(route, path=f"{prefix}{route.path}") for route in found]


def _dns(upstreams: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """Return how nginx resolves the upstream's name; None for addresses and for several names.

    nginx resolves several names only when it starts or is reloaded.
    """
    if len(upstreams) != 1 or _is_address(upstreams[0][0]):
        return None
    lines = (line.split() for line in _RESOLV_CONF.read_text().splitlines())
    servers = [words[1] for words in lines if words[:1] == ["nameserver"] and len(words) > 1]
    # nginx does not accept link-local addresses with an interface.
    resolvers = [f"[{s}]" if ":" in s else s for s in servers if "%" not in s]
    return {"resolvers": resolvers, "ipv6": has_ipv6()} if resolvers else None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return True


def _logs(log: str, folder: Path) -> dict[str, str]:
    """Return nginx's settings for the logs of requests and errors."""
    if log == "file":
        access = f'"{folder}/access.log" requests buffer=32k flush=1s'
        return {"access_log": access, "error_log": f'"{folder}/error.log" error'}
    if log == "stdout":
        return {"access_log": "/dev/stdout requests", "error_log": "stderr error"}
    # syslog, for journald, under which standard output is a socket that nginx cannot open.
    access = "syslog:server=unix:/dev/log,nohostname,tag=densenet_gateway requests"
    return {"access_log": access, "error_log": "stderr error"}


def default_upstreams(options: Options, port: int) -> list[tuple[str, int]]:
    """Return the configured upstreams; without any, the running server's port on loopback."""
    return read_upstreams(options.upstreams) or [(HOST, port)]
