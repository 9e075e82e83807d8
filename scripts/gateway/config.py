"""Render the gateway's nginx.conf from its options."""

import base64
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import joblib

from scripts.gateway.options import Options
from scripts.gateway.template import HUGGING_FACE, Route, has_ipv6, render_template
from scripts.serve.management import PIXEL
from scripts.serve.running import HOST

# Seconds that slow clients have to receive their responses after a reload.
DRAIN_SECONDS = 90
# Concurrent requests of 1 MB or more, per upstream: 64 of 20 MB take 2.6 GB in the frontend.
_MAX_LARGE = 64
# nginx's processes only forward bytes. In a container, `auto` would count the host's CPUs.
_MAX_PROCESSES = 4
# An IPv4 or IPv6 address with its port, or one that needs no DNS.
_NO_NAME = re.compile(r"[0-9.]+:|\[|localhost:")
_RESOLV_CONF = Path("/etc/resolv.conf")


def render(options: Options, folder: Path, upstreams: Sequence[str]) -> str:
    """Return the gateway's nginx.conf; `upstreams` are the HOST:PORT of TorchServes.

    A single host name stands for all its addresses and is resolved again when they change.
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
        },
        keepalive=options.keepalive,
        timeout=options.timeout,
        prefix=options.prefix,
        servers=upstreams,
        resolver=_resolver(upstreams),
        listeners=[
            {"address": address, "port": port, "tls": tls}
            for address in addresses
            for port, tls in ((options.http_port, False), (options.https_port, True))
        ],
        tls={"certificate": certificate, "key": key},
        redirect_port=0 if options.is_loopback else options.https_port,
        acme=Path(options.acme).resolve() if options.acme else None,
        pixel=base64.b64encode(PIXEL).decode(),
        model=options.model,
        routes=routes(options.model, options.prefix),
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
    predictions, explanations = f"/predictions/{model}", f"/explanations/{model}"
    upload = ("POST", "PUT")
    kserve = (
        *(f"/v1/models/{model}:{verb}" for verb in ("predict", "explain")),
        *(f"/v2/models/{model}/{verb}" for verb in ("infer", "explain")),
    )
    return [
        # The web UI, and HTML forms without an action, which are posted to the same path.
        Route(f"{prefix}/", predictions, ("GET", "HEAD", "POST")),
        Route(f"{prefix}/predict", predictions, upload),
        Route(f"{prefix}/explain", explanations, upload),
        Route(f"{prefix}{predictions}", predictions, ("GET", "HEAD", *upload)),
        Route(f"{prefix}{explanations}", explanations, upload),
        *(Route(f"{prefix}{path}", path, ("POST",)) for path in kserve),
        Route(f"{prefix}/{HUGGING_FACE}/{model}", predictions, ("POST",), HUGGING_FACE),
    ]


def _resolver(upstreams: Sequence[str]) -> str:
    """Return the DNS server for a single upstream that is a name; "" for all other upstreams.

    nginx resolves several names only when it starts or is reloaded.
    """
    if len(upstreams) > 1 or _NO_NAME.match(upstreams[0]):
        return ""
    lines = (line.split() for line in _RESOLV_CONF.read_text().splitlines())
    # nginx does not accept link-local addresses with an interface. It would use several servers in
    # turn, but podman's others cannot resolve the name.
    servers = [w[1] for w in lines if len(w) > 1 and w[0] == "nameserver" and "%" not in w[1]]
    if not servers:
        return ""
    address = f"[{servers[0]}]" if ":" in servers[0] else servers[0]
    return address if has_ipv6() else f"{address} ipv6=off"


def _logs(log: str, folder: Path) -> dict[str, str]:
    """Return nginx's settings for the logs of requests and errors."""
    if log == "file":
        access = f'"{folder}/access.log" requests buffer=32k flush=1s'
        return {"access_log": access, "error_log": f'"{folder}/error.log" error'}
    # systemd's standard output is a socket that nginx cannot open.
    journal = "syslog:server=unix:/dev/log,nohostname,tag=densenet_gateway"
    target = "/dev/stdout" if log == "stdout" else journal
    return {"access_log": f"{target} requests", "error_log": "stderr error"}
