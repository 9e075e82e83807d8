"""Runs nginx in front of the nodes, as an ordinary user.

All that the gateway needs is in one folder, `.run/gateway`: its configuration, filled in from
`deploy/gateway/nginx.conf.jinja`, its logs, a certificate for trying, and `gateway.json`, which
says what it is made of. Whoever changes which nodes serve does it with `change_nodes`, which holds
a lock, writes the configuration anew and reloads nginx without cutting a connection. What takes
longer than that, an upgrade or a drain, is an `operation`, of which there is one at a time.
"""

import base64
import dataclasses
import fcntl
import functools
import hashlib
import ipaddress
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from scripts.keys import SESSION_SECONDS, Key, read_keys
from scripts.preflight import check_ports
from scripts.server import HOST, PIXEL, RUN_DIR, find_running
from scripts.state import (
    forget,
    living_process,
    process_of,
    recall,
    remember,
    started,
    unreadable,
)
from scripts.terminal import UserError
from scripts.waiting import HOLD

GATEWAY_DIR = RUN_DIR / "gateway"
STATE = "gateway.json"
TEMPLATES = Path("deploy/gateway")
SIGN_IN_PAGE = "sign-in.html.jinja"

_CERTIFICATE_DAYS = 90
# Attempts at a request that failed within so many seconds. Killing a single node's worker whenever
# it was back cost one attempt of three its answer.
_TRIES = 6
_QUICK_FAILURE = 5
# Wrong keys of one address: so many a second for long, and so many at once.
_WRONG_KEYS = {"rate": 1, "burst": 20}

# Seconds.
_START_TIMEOUT = 10.0
DRAIN_TIMEOUT = 100.0
_POLL = 0.05


@dataclass(frozen=True)
class Options:
    """How the gateway faces its clients.

    Attributes:
        host: address to listen on. Beyond loopback, keys are compulsory and plain HTTP is only
            sent on to HTTPS.
        http_port: plain HTTP.
        https_port: HTTPS with HTTP/2.
        certificate: PEM file, the certificate and what signed it; empty for a self-signed one.
        certificate_key: PEM file of its private key.
        keys: file of clients' keys, a name and a key a line; without one nobody needs a key.
        rate: requests a second that one client may send for long.
        burst: requests that one client may send at once beyond that.
        connections: requests of one client at the same time.
        timeout: seconds after which a node that does not answer is given up. Longer than TorchServe
            gives a worker (`responseTimeout`).
        metrics_port: what the gateway counted, for Prometheus, on loopback.
    """

    host: str = HOST
    http_port: int = 5000
    https_port: int = 8443
    certificate: str = ""
    certificate_key: str = ""
    keys: str = ""
    rate: int = 50
    burst: int = 100
    connections: int = 64
    timeout: int = 70
    metrics_port: int = 9145

    @property
    def address(self) -> str:
        """The host as URLs and nginx write it."""
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True)
class Node:
    """A TorchServe behind the gateway.

    Attributes:
        run_dir: its folder, see `scripts.server`.
        archive: what it serves.
        workers: its worker processes.
        drained: an operator took it out.
        healthy: false where the watch found that it cannot answer.
    """

    run_dir: str
    archive: str
    workers: int
    drained: bool = False
    healthy: bool = True

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return Path(self.run_dir).resolve().name.lstrip(".")


@dataclass(frozen=True)
class Gateway:
    """A gateway that is running, as `gateway.json` in its folder remembers it.

    Attributes:
        pid: nginx's master process.
        started: when that started, see `scripts.state`.
        sockets: folder of the nodes' sockets; a socket's path must be short.
        options: how it faces clients.
        nodes: what it stands in front of.
        secret: what browsers' sessions are made with, see `scripts.keys`.
        watch_pid: the process that watches over the nodes; 0 for none.
        watch_started: when that started.
        keys: the clients' keys as they were last read without a mistake.
    """

    pid: int
    started: str
    sockets: str
    options: Options
    nodes: tuple[Node, ...]
    secret: str
    watch_pid: int = 0
    watch_started: str = ""
    keys: tuple[Key, ...] = ()

    @property
    def url(self) -> str:
        """Plain HTTP."""
        return f"http://{self.options.address}:{self.options.http_port}"

    @property
    def https_url(self) -> str:
        """HTTPS."""
        return f"https://{self.options.address}:{self.options.https_port}"

    def process(self) -> psutil.Process | None:
        """The master process of nginx; None where it has ended, or its id is another's by now."""
        return living_process(self.pid, self.started)

    def watch(self) -> psutil.Process | None:
        """The watch's process; None where it has ended."""
        return living_process(self.watch_pid, self.watch_started) if self.watch_pid else None


def find_gateway(folder: Path = GATEWAY_DIR) -> Gateway | None:
    """The gateway of this folder, if it runs."""
    values = recall(folder / STATE)
    if values is None:
        return None
    try:
        gateway = Gateway(
            **{
                **values,
                "options": Options(**values["options"]),
                "nodes": tuple(Node(**node) for node in values["nodes"]),
                "keys": tuple(Key(**key) for key in values.get("keys", ())),
            }
        )
    except (TypeError, KeyError) as error:
        raise unreadable(folder / STATE) from error
    return gateway if gateway.process() is not None else None


def require_gateway(folder: Path = GATEWAY_DIR) -> Gateway:
    """The gateway of this folder; `UserError` where none runs."""
    gateway = find_gateway(folder)
    if gateway is None:
        raise UserError("The gateway is not running. Start it with: make gateway")
    return gateway


def start(
    options: Options, nodes: Sequence[Node], folder: Path = GATEWAY_DIR, *, watch: bool = True
) -> Gateway:
    """Starts nginx in front of the nodes, and the watch over them.

    Raises:
        UserError: nginx is missing or refuses its configuration, or the options are unsafe.
    """
    check(options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = _with_certificate(options, folder)
    (folder / "ready.json").write_text('{"success":true,"status":"ready"}\n')
    # What a gateway that was cut off may have left.
    (folder / "nginx.pid").unlink(missing_ok=True)
    sockets = tempfile.mkdtemp(prefix="gateway-")
    keys = _read_keys(options)
    gateway = Gateway(0, "", sockets, options, tuple(nodes), secrets.token_hex(), keys=keys)
    try:
        _write_sign_in_pages(folder)
        _write_config(gateway, folder)
        _nginx(folder)
        pid = int(_wait_for(lambda: _read(folder / "nginx.pid"), "nginx did not start"))
        gateway = dataclasses.replace(gateway, pid=pid, started=started(pid))
        # Before the watch starts, which ends where there is no gateway.
        remember(folder / STATE, dataclasses.asdict(gateway))
        if watch:
            gateway = _watched(gateway, folder)
    except BaseException:
        stop_lost(find_lost(folder))
        forget(folder / STATE)
        shutil.rmtree(sockets, ignore_errors=True)
        raise
    return gateway


def _watched(gateway: Gateway, folder: Path) -> Gateway:
    """Starts the watch."""
    pid = _start_watch(folder)
    gateway = dataclasses.replace(gateway, watch_pid=pid, watch_started=started(pid))
    with _lock(folder):
        # The watch may have changed the nodes already.
        gateway = dataclasses.replace(gateway, nodes=require_gateway(folder).nodes)
        remember(folder / STATE, dataclasses.asdict(gateway))
    return gateway


def stop(gateway: Gateway, folder: Path = GATEWAY_DIR) -> None:
    """Ends the watch and nginx; requests in hand are answered first."""
    _end(gateway.watch(), signal.SIGTERM)
    _end(gateway.process(), signal.SIGQUIT)
    shutil.rmtree(gateway.sockets, ignore_errors=True)
    forget(folder / STATE)


def find_lost(folder: Path = GATEWAY_DIR) -> list[psutil.Process]:
    """The watch and nginx of this folder, by what they run: for when the folder was removed."""
    place = folder.resolve()
    found = (
        process_of("scripts.watch", str(place)),
        process_of("nginx", "-c", f"{place}/nginx.conf"),
    )
    return [process for process in found if process is not None]


def stop_lost(processes: Iterable[psutil.Process]) -> None:
    """Ends what `find_lost` found; nginx answers first what it has."""
    for process in processes:
        _end(process, signal.SIGQUIT if process.name() == "nginx" else signal.SIGTERM)


def _end(process: psutil.Process | None, sign: signal.Signals) -> None:
    if process is None:
        return
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:
        return
    _, left = psutil.wait_procs([process], timeout=DRAIN_TIMEOUT)
    for slow in left:
        slow.terminate()


@contextmanager
def operation(what: str, folder: Path = GATEWAY_DIR) -> Iterator[None]:
    """Holds the right to take nodes in and out, which only one process has at a time.

    The kernel takes it back from a holder that dies, however it dies.

    Args:
        what: the holder in words, for those who are refused meanwhile.
        folder: the gateway's.

    Raises:
        UserError: somebody else has it.
    """
    with (folder / "operation").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "something else"
            raise UserError(
                f"Not now: {holder} changes which nodes serve. Ask again when that is over."
            ) from error
        file.truncate(0)
        file.write(f"{what} (process {os.getpid()})")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def change_nodes(
    change: Callable[[tuple[Node, ...]], Sequence[Node]], folder: Path = GATEWAY_DIR
) -> set[int]:
    """Changes which nodes serve, and lets nginx know.

    Args:
        change: makes the new list from the present one.
        folder: the gateway's.

    Returns:
        processes of nginx that still work by the old list, for `wait_for_drain`.
    """
    with _lock(folder):
        gateway = require_gateway(folder)
        gateway = dataclasses.replace(gateway, nodes=tuple(change(gateway.nodes)))
        # A mistake in that file keeps no node from being changed; `check_keys` says it.
        with suppress(UserError):
            gateway = dataclasses.replace(gateway, keys=_read_keys(gateway.options))
        changed = _write_config(gateway, folder)
        remember(folder / STATE, dataclasses.asdict(gateway))
        return _reload(gateway) if changed else set()


def check_keys(gateway: Gateway) -> None:
    """Stops, by a `UserError`, where the file of keys is not what counts."""
    try:
        _read_keys(gateway.options)
    except UserError as error:
        raise UserError(f"The keys that were read last still count. {error}") from error


def _read_keys(options: Options) -> tuple[Key, ...]:
    return tuple(read_keys(Path(options.keys))) if options.keys else ()


def wait_for_drain(old: set[int]) -> bool:
    """Waits until those processes have answered what they had; false where some took too long."""
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while any(psutil.pid_exists(pid) for pid in old):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def check(options: Options, folder: Path = GATEWAY_DIR) -> None:
    """Stops, by a `UserError`, what cannot work or would not be safe; starts nothing."""
    if shutil.which("nginx") is None:
        raise UserError("nginx is missing. Install it (on Debian and Ubuntu: apt install nginx).")
    if not _is_loopback(options.host) and not options.keys:
        raise UserError(
            f"{options.host} can be reached by others, and nobody would need a key. Give a file of "
            "keys with KEYS=file: a line a client, its name and a key of 16 or more letters and "
            "digits."
        )
    for name in ("rate", "burst", "connections", "timeout"):
        if getattr(options, name) < 1:
            raise UserError(f"{name.upper()} must be 1 or more, got {getattr(options, name)}.")
    _read_keys(options)
    _check_certificate(options)
    lost = find_lost(folder)
    if lost:
        raise UserError(
            f"A gateway of {folder} still runs (process {lost[-1].pid}), though its folder was "
            "removed or changed. End it with: make gateway-stop"
        )
    ports = {
        "http": options.http_port,
        "https": options.https_port,
        "metrics": options.metrics_port,
    }
    # Metrics are on loopback, whatever the host is.
    check_ports(options.host, ports, held=[options.metrics_port])
    check_ports(HOST, {"metrics": options.metrics_port})


def _check_certificate(options: Options) -> None:
    if bool(options.certificate) != bool(options.certificate_key):
        raise UserError("CERTIFICATE and CERTIFICATE_KEY belong together; give both, or neither.")
    if not options.certificate:
        return
    for file in (options.certificate, options.certificate_key):
        if not Path(file).is_file():
            raise UserError(f"{file} is not a file.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            options.certificate, options.certificate_key, password=""
        )
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"{options.certificate} and {options.certificate_key} are no certificate and its "
            f"private key, both PEM and the key without a password: {error}"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise UserError(f"HOST must be an IP address, got {host!r}.") from error


def _with_certificate(options: Options, folder: Path) -> Options:
    """Fills in a self-signed certificate where the options name none."""
    if options.certificate:
        return dataclasses.replace(
            options,
            certificate=str(Path(options.certificate).resolve()),
            certificate_key=str(Path(options.certificate_key).resolve()),
        )
    certificate, key = folder.resolve() / "certificate.pem", folder.resolve() / "certificate.key"
    _self_signed(certificate, key)
    return dataclasses.replace(options, certificate=str(certificate), certificate_key=str(key))


def _self_signed(certificate: Path, key: Path) -> None:
    """Makes a certificate that is good for trying: no client trusts it unless told to."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    )
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.touch(mode=0o600)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _write_config(gateway: Gateway, folder: Path) -> bool:
    """Writes nginx's configuration; false where it stays as it is.

    Raises:
        UserError: nginx refuses it; the old one stays then.
    """
    path = folder / "nginx.conf"
    text = _config(gateway, folder)
    if path.exists() and path.read_text() == text:
        return False
    candidate = folder / "nginx.conf.new"
    candidate.touch(mode=0o600)
    candidate.write_text(text)
    _nginx(folder, "-t", config=candidate)
    candidate.replace(path)
    return True


def _config(gateway: Gateway, folder: Path) -> str:
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
        loopback=_is_loopback(options.host),
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


def _write_sign_in_pages(folder: Path) -> None:
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


def _upstream(node: Node, sockets: str) -> dict[str, str | int] | None:
    """What the template needs of a node; None where it does not run, or only begins to."""
    running = find_running(Path(node.run_dir))
    if running is None:
        return None
    try:
        authorization = running.authorization("inference").get("Authorization", "")
    except (OSError, ValueError):
        return None  # its file of tokens is not there or not whole yet
    port = running.ports.inference
    # After a reload the old processes of nginx take connections for a moment still. They must not
    # get those of the new ones: what they would send to this node is an old port or a void token.
    current = hashlib.sha256(f"{port} {authorization}".encode()).hexdigest()[:8]
    return {
        "name": node.name,
        "port": port,
        "authorization": authorization,
        "socket": f"{sockets}/{node.name}.{current}.sock",
    }


def _nginx(folder: Path, *arguments: str, config: Path | None = None) -> None:
    path = (config or folder / "nginx.conf").resolve()
    log = folder.resolve() / "error.log"
    result = subprocess.run(
        ["nginx", "-c", str(path), "-e", str(log), *arguments],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(f"nginx refuses to start: {result.stderr.strip()[-500:]}")


def _reload(gateway: Gateway) -> set[int]:
    """Has nginx read its configuration anew; returns the processes that work by the old one."""
    master = gateway.process()
    assert master is not None
    old = {child.pid for child in master.children()}
    master.send_signal(signal.SIGHUP)
    _wait_for(
        lambda: "new" if {child.pid for child in master.children()} - old else "",
        "nginx did not read its configuration anew",
    )
    return old


def _start_watch(folder: Path) -> int:
    """Starts the watch in a session of its own, so that Ctrl-C in this terminal does not end it."""
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "scripts.watch", "--folder", str(folder.resolve())],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(folder / "watch.log"), appending, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def _wait_for(read: Callable[[], str], failure: str) -> str:
    deadline = time.monotonic() + _START_TIMEOUT
    while not (value := read()):
        if time.monotonic() > deadline:
            raise UserError(f"{failure} within {_START_TIMEOUT:.0f} s.")
        time.sleep(_POLL)
    return value


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
