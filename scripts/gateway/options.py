"""The options of `make gateway`, and their checks before it starts."""

import ipaddress
import re
import shutil
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from scripts.gateway.keys import Key, read_keys
from scripts.gateway.template import has_ipv6
from scripts.serve.running import HOST
from scripts.terminal import UserError

_UPSTREAM = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_MODEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)?")
_MAX_PORT = 65535
# nginx.conf.jinja retries timeouts within 5 s as failed connects, so `timeout` must be longer.
_MIN = {"rate": 1, "burst": 1, "connections": 1, "keepalive": 1, "timeout": 10}


@dataclass(frozen=True)
class Options:
    """Options of `make gateway`; its command line is made from these fields.

    Unless `host`, or `published` for a container, is loopback, keys are required and plain HTTP is
    redirected to HTTPS.
    """

    upstreams: Annotated[str, Option(help="HOST:PORT of servers, separated by spaces.")] = ""
    model: Annotated[str, Option(help="Name of the model.")] = ""
    host: Annotated[str, Option(help="IP address to listen on.")] = HOST
    http_port: int = 5000
    https_port: int = 8443
    keys: Annotated[str, Option(help="File of API keys.")] = ""
    # By default, a self-signed certificate is created.
    certificate: Annotated[str, Option(help="PEM file.")] = ""
    certificate_key: Annotated[str, Option(help="PEM file.")] = ""
    acme: Annotated[str, Option(help="Folder of certbot --webroot.")] = ""
    rate: Annotated[int, Option(help="Rate limit: requests per second of a client.")] = 50
    burst: Annotated[int, Option(help="Requests accepted above the rate.")] = 100
    connections: Annotated[int, Option(help="Concurrent requests of a client.")] = 64
    proxies: Annotated[str, Option(help="Addresses of load balancers.")] = ""
    prefix: Annotated[str, Option(help="Path behind a proxy, such as /classify.")] = ""
    # Longer than the balancer's.
    keepalive: Annotated[int, Option(help="Seconds an idle connection stays open.")] = 75
    # Longer than TorchServe waits for a worker.
    timeout: Annotated[int, Option(help="Seconds to wait for an answer.")] = 70
    published: Annotated[str, Option(help="Address of a container's ports.")] = ""
    log: Annotated[str, Option(help="file, stdout or syslog.")] = "file"
    foreground: Annotated[bool, Option(help="Run until SIGTERM or SIGQUIT.")] = False

    @property
    def address(self) -> str:
        """Return the host in the notation of URLs and nginx."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        """Return the gateway's plain HTTP URL."""
        return f"http://{self.address}:{self.http_port}{self.prefix}"

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine can reach the gateway."""
        return ipaddress.ip_address(self.published or self.host).is_loopback

    def read_keys(self) -> list[Key]:
        """Return the API keys; empty if no file is configured."""
        return read_keys(Path(self.keys)) if self.keys else []


def check(options: Options) -> None:
    """Check all options except the ports.

    Raises:
        UserError: an option is invalid or unsafe.
    """
    if shutil.which("nginx") is None:
        raise UserError("nginx is missing. Install it (on Debian and Ubuntu: apt install nginx).")
    _check_addresses(options)
    if not options.is_loopback and not options.keys:
        raise UserError(
            f"{options.published or options.host} is not a loopback address: others could use the "
            "service without a key. Set KEYS=file, with one line per client: its name and a key of "
            "16 or more letters and digits."
        )
    for name, minimum in _MIN.items():
        if (got := getattr(options, name)) < minimum:
            raise UserError(f"{name.upper()} must be {minimum} or more, got {got}.")
    if not _MODEL.fullmatch(options.model):
        raise UserError(f"MODEL must be letters, digits, - . and _, got {options.model!r}.")
    if not _PREFIX.fullmatch(options.prefix):
        raise UserError(f"PREFIX must be a path such as /classify, got {options.prefix!r}.")
    if options.log not in {"file", "stdout", "syslog"}:
        raise UserError(f"LOG must be file, stdout or syslog, got {options.log!r}.")
    options.read_keys()
    _check_certificate(options.certificate, options.certificate_key)


def _check_addresses(options: Options) -> None:
    for name, address in {"HOST": options.host, "PUBLISHED": options.published or HOST}.items():
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise UserError(f"{name} must be an IP address, got {address!r}.") from error
    if ":" in options.host and not has_ipv6():
        raise UserError(f"HOST={options.host} is an IPv6 address, and this machine has no IPv6.")
    try:
        for network in options.proxies.split():
            ipaddress.ip_network(network)
    except ValueError as error:
        raise UserError(f"PROXIES must be addresses or networks: {error}.") from error
    read_upstreams(options.upstreams)


def _check_certificate(certificate: str, key: str) -> None:
    if bool(certificate) != bool(key):
        raise UserError("CERTIFICATE and CERTIFICATE_KEY belong together; give both, or neither.")
    if not certificate:
        if shutil.which("openssl") is None:
            raise UserError(
                "Set CERTIFICATE and CERTIFICATE_KEY, or install openssl for a trial one."
            )
        return
    for file in (certificate, key):
        if not Path(file).is_file():
            raise UserError(f"{file} is not a file that this user can read.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"{certificate} and {key} are not a certificate and its private key, both PEM and the "
            f"key without a password: {error}"
        ) from error


def read_upstreams(text: str) -> list[str]:
    """Parse the HOST:PORT of upstreams, such as "densenet:8080" or "10.0.0.7:8080 [::1]:80".

    Raises:
        UserError: one is not HOST:PORT.
    """
    for word in text.split():
        match = _UPSTREAM.fullmatch(word)
        if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
            raise UserError(f"UPSTREAMS must be HOST:PORT, separated by spaces, got {word!r}.")
    return text.split()
