"""Installing, with the real uv, from a package index that the tests make: torch and all are fakes.

Nothing is asked of the network: a proxy on this machine stands for all of it, PyTorch's own index,
whose address only uv knows, included.
"""

import hashlib
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from scripts import bootstrap

VERSION = "99.0"
HERE = "127.0.0.1"

Signed = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


class Answers(BaseHTTPRequestHandler):
    """What a `Server` answers; TLS to any host ends here."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        context = self.server.index.context(self.path.rpartition(":")[0])
        self.connection = context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def do_GET(self) -> None:
        index = self.server.index
        index.asked.append(self.path)
        elsewhere = isinstance(self.connection, ssl.SSLSocket)
        if elsewhere:
            index.closed.wait(index.seconds_until_cpu_answers)
        parts = urllib.parse.unquote(self.path).strip("/").split("/")
        if parts[0] == "files":
            body = (index.folder / parts[-1]).read_bytes()
        else:
            body = index.page(parts[-1], cpu=elsewhere or parts[0] == "cpu").encode()
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def finish(self) -> None:
        super().finish()
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Server(ThreadingHTTPServer):
    index: "Index"

    def handle_error(self, *_: object) -> None:
        """Who stopped waiting for an answer is no error."""


class Index:
    """Package indexes at an address, at its `cpu`, and at all that is asked for through it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Longer than anybody waits for it.
        self.seconds_until_cpu_answers = bootstrap.PROBE_SECONDS + 2.0
        self.closed = threading.Event()
        self.asked: list[str] = []
        self._authority = _certificate(None, "tests")
        (folder / "ca.pem").write_bytes(_pem(self._authority[0]))
        self._server = Server((HERE, 0), Answers)
        self._server.index = self
        self.address = f"http://{HERE}:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def context(self, host: str) -> ssl.SSLContext:
        """A server's side of TLS, as any host."""
        certificate, key = _certificate(self._authority, host)
        pem = self.folder / f"{host}-{threading.get_ident()}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        pem.write_bytes(private + _pem(certificate))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pem)
        return context

    def page(self, name: str, *, cpu: bool) -> str:
        """Links to the wheels of a package: PyTorch's for CPUs, or all others."""
        wheels = sorted(self.folder.glob(f"{name.replace('-', '_')}-*.whl"))
        return "".join(
            f'<a href="{self.address}files/{wheel.name.replace("+", "%2B")}">{wheel.name}</a>\n'
            for wheel in wheels
            if ("+cpu" in wheel.name) is cpu
        )

    def add(self, name: str, number: str = VERSION, script: Path | None = None) -> str:
        """Makes a wheel of one module, or of one program; its lines for a lock."""
        module = name.replace("-", "_")
        stem = f"{module}-{number}"
        info = f"{stem}.dist-info"
        path = self.folder / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            if script:
                wheel.write(script, f"{stem}.data/scripts/{script.name}")
            else:
                wheel.writestr(f"{module}.py", f"version = {number!r}\n")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            names = [*wheel.namelist(), f"{info}/RECORD"]
            wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"{name}=={number} \\\n    --hash=sha256:{digest}\n"


def _certificate(issuer: Signed | None, name: str) -> Signed:
    """A host's certificate; without an issuer, an authority's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=not issuer, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    return certificate, key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Project:
    """A copy of the installer with locks of its own."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self.site = folder / ".venv/lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        (folder / "scripts").mkdir()
        shutil.copy("scripts/bootstrap.py", folder / "scripts")
        shutil.copytree("client", folder / "client")
        uv = Path(sys.executable).parent / "uv"
        for name in ("torch", "torchvision"):
            index.add(name, f"{VERSION}+cpu")
        names = ("torch", "torchvision", "nvidia-fake", "library")
        self.locked = {name: index.add(name) for name in names}
        self.locked["uv"] = index.add("uv", version("uv"), uv)
        self.write("requirements.lock", "".join(self.locked.values()))
        self.write("tests/requirements.lock", index.add("tool"))
        self.write("benchmarks/requirements.lock", index.add("peer"))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def setup(self, *groups: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the installer to its end."""
        with self.start(*groups, **variables) as process:
            output, errors = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(self, *groups: str, **variables: str) -> subprocess.Popen[str]:
        """Starts the installer with nothing but the index to ask."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "TORCH"))}
        own |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": self.index.address,
            "UV_CACHE_DIR": str(self.folder / "cache"),
            "HTTPS_PROXY": self.index.address,
            "NO_PROXY": HERE,
            "SSL_CERT_FILE": str(self.index.folder / "ca.pem"),
        }
        return subprocess.Popen(
            [sys.executable, "scripts/bootstrap.py", "run", *groups],
            cwd=self.folder,
            env=own | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def installed(self) -> dict[str, str]:
        """Versions by name, of all but what Python's own environments begin with."""
        found = (path.name.removesuffix(".dist-info") for path in self.site.glob("*.dist-info"))
        versions = dict(name.split("-") for name in found)
        return {k: v for k, v in versions.items() if k not in {"pip", "setuptools", "uv"}}

    def imported(self, package: str) -> Path:
        """The file that a package is imported from, without what it needs."""
        program = f"from importlib.util import find_spec; print(find_spec({package!r}).origin)"
        python = self.folder / ".venv/bin/python"
        done = subprocess.run(
            [python, "-I", "-c", program], capture_output=True, check=True, text=True
        )
        return Path(done.stdout.strip())


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index")
    yield index
    index.close()


@pytest.fixture
def project(index: Index, tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", index)


OWN = {"classification_client": version("classification-client"), "library": VERSION}
AS_LOCKED = OWN | {"torch": VERSION, "torchvision": VERSION, "nvidia_fake": VERSION}
CPU_BUILD = OWN | {"torch": f"{VERSION}+cpu", "torchvision": f"{VERSION}+cpu"}


def test_groups_are_installed_once_each_beside_the_others_and_mended(project: Project) -> None:
    # What somebody left who stopped it.
    (project.folder / ".venv").mkdir()
    first = project.setup()
    assert first.returncode == 0, first.stderr
    assert project.installed() == AS_LOCKED
    assert "4 for running with CUDA: up to " in first.stdout

    # A finished installation is found without starting anything.
    uv = project.folder / ".venv/bin/uv"
    (project.folder / "uv").hardlink_to(uv)
    uv.unlink()
    project.index.asked.clear()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = project.setup()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    assert not project.index.asked
    uv.hardlink_to(project.folder / "uv")

    second = project.setup("tests")
    assert second.returncode == 0, second.stderr
    assert "1 for tests" in second.stdout
    assert project.installed() == AS_LOCKED | {"tool": VERSION}
    assert project.setup("benchmarks").returncode == 0
    everything = AS_LOCKED | {"tool": VERSION, "peer": VERSION}
    assert project.installed() == everything

    older = project.locked["library"]
    for lines, number in (
        (project.index.add("library", "100"), "100"),
        (older, VERSION),
        (project.index.add("library", "100"), "100"),
    ):
        project.locked["library"] = lines
        project.write("requirements.lock", "".join(project.locked.values()))
        assert project.setup().returncode == 0
        assert project.installed() == everything | {"library": number}

    metadata = (project.folder / "client/pyproject.toml").read_text()
    project.write(
        "client/pyproject.toml",
        re.sub('^version = ".*"', 'version = "99"', metadata, flags=re.MULTILINE),
    )
    assert project.setup().returncode == 0
    assert project.installed() == everything | {"library": "100", "classification_client": "99"}
    assert (
        project.imported("classification_client").parent
        == project.folder / "client/classification_client"
    )

    (project.folder / ".venv/bin/python").unlink()
    assert project.setup().returncode == 0
    assert project.installed() == AS_LOCKED | {"library": "100", "classification_client": "99"}


def test_what_cannot_be_installed_is_said_in_a_sentence(project: Project) -> None:
    script = project.folder / "scripts/bootstrap.py"
    text = script.read_text()
    script.write_text(text.replace('"run": (0.3, 0.8)', '"run": (0.3, 1e9)'))
    too_large = project.setup()
    assert too_large.returncode == 1
    assert "GB are free on the disk of " in too_large.stderr

    script.write_text(text)
    wheel = next(project.index.folder.glob("library-*.whl"))
    with zipfile.ZipFile(wheel, "a") as altered:
        altered.writestr("library_too.py", "")
    not_the_locks = project.setup()
    assert not_the_locks.returncode == 1
    assert "Hash mismatch" in not_the_locks.stderr
    assert not_the_locks.stderr.splitlines()[-1].startswith("Error: uv could not install")

    project.write("requirements.lock", "".join(project.locked.values()) + "another==1.0\n")
    without_a_hash = project.setup()
    assert without_a_hash.returncode == 1
    assert "must have a hash" in without_a_hash.stderr

    script.write_text(text.replace("FULL_GIGABYTES = 0.2", "FULL_GIGABYTES = 1e9"))
    full = project.setup()
    assert full.stderr.splitlines()[-1].startswith("Error: The disk of ")
    assert project.installed() == {}


def test_torch_comes_from_the_index_that_was_named_and_stays(project: Project) -> None:
    done = project.setup(TORCH_INDEX=project.index.address + "cpu")
    assert done.returncode == 0, done.stderr
    assert project.installed() == CPU_BUILD
    assert project.setup("tests").returncode == 0
    assert project.installed() == CPU_BUILD | {"tool": VERSION}
    assert (project.folder / ".venv/torch").stat().st_mode & 0o077 == 0

    # Another choice is another environment.
    assert project.setup(TORCH_INDEX=project.index.address).returncode == 0
    assert project.installed() == {k: v for k, v in AS_LOCKED.items() if "nvidia" not in k}


@pytest.mark.skipif(
    bootstrap.has_nvidia_driver() or sys.platform != "linux",
    reason="the CPU build is for Linux without an NVIDIA driver",
)
def test_a_machine_without_a_driver_gets_the_cpu_build_and_ctrl_c_can_be_gone_on_from(
    project: Project,
) -> None:
    project.index.seconds_until_cpu_answers = 60
    with project.start() as process:
        while not any(path.endswith("/torch/") for path in project.index.asked):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "Stopped by Ctrl-C. Run the same command again" in errors

    project.index.seconds_until_cpu_answers = 0
    done = project.setup()
    assert done.returncode == 0, done.stderr
    assert "making" not in done.stdout
    assert project.installed() == CPU_BUILD
    assert project.setup().stdout == ""

    # A driver that came later.
    programs = project.folder / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").touch(mode=0o755)
    done = project.setup(PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert project.installed() == AS_LOCKED


def test_make_hands_the_index_on_as_it_is() -> None:
    address = 'http://me:it\'s"secret" @127.0.0.1/cpu'
    done = subprocess.run(
        ["make", "setup", f"TORCH_INDEX={address}", "PYTHON=printenv TORCH_INDEX; :"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{address}\n"


@pytest.mark.parametrize(
    "python", sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")) or [None]
)
def test_an_old_python_is_told_so(python: Path | None) -> None:
    if python is None:
        pytest.skip("no old Python is here")
    done = subprocess.run(
        [python, "scripts/bootstrap.py", "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Python 3.10 or newer is needed, this is 3.")
