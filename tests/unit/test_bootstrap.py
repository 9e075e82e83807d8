"""Installing, with the real uv, from a package index that the tests make: torch and all are fakes.

Nothing is asked of the network: a proxy on this machine stands for all of it, PyTorch's own index,
whose address only uv knows, included.
"""

import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
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


class Index:
    """Package indexes at an address, at its `cpu`, and at all that is asked for through it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds_until_cpu_answers = 0.0
        self.asked: list[str] = []
        self._authority = _certificate(None, "tests")
        (folder / "ca.pem").write_bytes(_pem(self._authority[0]))
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_CONNECT(self) -> None:
                host = self.path.rpartition(":")[0]
                self.send_response(200)
                self.end_headers()
                self.connection = index.context(host).wrap_socket(self.connection, server_side=True)
                self.rfile = self.connection.makefile("rb")
                self.wfile = self.connection.makefile("wb", 0)
                self.close_connection = False

            def do_GET(self) -> None:
                index.asked.append(self.path)
                proxied = isinstance(self.connection, ssl.SSLSocket)
                parts = self.path.strip("/").split("/")
                if parts[0] == "files":
                    return self._answer((folder / parts[-1]).read_bytes())
                cpu = proxied or parts[0] == "cpu"
                if proxied:
                    time.sleep(index.seconds_until_cpu_answers)
                return self._answer(index.page(parts[-1], cpu=cpu).encode())

            def do_HEAD(self) -> None:
                self.do_GET()

            def _answer(self, body: bytes) -> None:
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((HERE, 0), Handler)
        self.address = f"http://{HERE}:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def context(self, host: str) -> ssl.SSLContext:
        """A server's side of TLS, as any host."""
        certificate, key = _certificate(self._authority, host)
        pem = self.folder / f"{host}.pem"
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
        uv = Path(sys.executable).parent / "uv"
        names = ("torch", "torchvision", "nvidia-fake", "library")
        self.lock = index.add("uv", version("uv"), uv) + "".join(map(index.add, names))
        self.write("requirements.lock", self.lock)
        self.write("tests/requirements.lock", index.add("tool"))
        self.write("benchmarks/requirements.lock", index.add("peer"))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def setup(self, *groups: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the installer with nothing but the index to ask."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "TORCH"))}
        own |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": self.index.address,
            "UV_CACHE_DIR": str(self.folder / "cache"),
            "HTTPS_PROXY": self.index.address,
            "NO_PROXY": HERE,
            "SSL_CERT_FILE": str(self.index.folder / "ca.pem"),
        }
        return subprocess.run(
            [sys.executable, "scripts/bootstrap.py", "run", *groups],
            cwd=self.folder,
            env=own | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self) -> dict[str, str]:
        """Versions by name, of all but what Python's own environments begin with."""
        found = (path.name.removesuffix(".dist-info") for path in self.site.glob("*.dist-info"))
        versions = dict(name.split("-") for name in found)
        return {k: v for k, v in versions.items() if k not in {"pip", "setuptools", "uv"}}


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


AS_LOCKED = {"torch": VERSION, "torchvision": VERSION, "nvidia_fake": VERSION, "library": VERSION}
CPU_BUILD = {"torch": f"{VERSION}+cpu", "torchvision": f"{VERSION}+cpu", "library": VERSION}


def test_a_group_is_installed_once_and_another_beside_it(project: Project) -> None:
    first = project.setup()
    assert first.returncode == 0, first.stderr
    assert project.installed() == AS_LOCKED
    announced = next(line for line in first.stdout.splitlines() if "to fetch" in line)
    assert "5 for running with CUDA: up to " in announced or "4 for running" in announced

    project.index.asked.clear()
    assert project.setup().stdout == ""
    assert not project.index.asked

    second = project.setup("tests")
    assert second.returncode == 0, second.stderr
    assert project.installed() == AS_LOCKED | {"tool": VERSION}
    assert "1 for tests" in second.stdout
    assert project.setup("benchmarks").returncode == 0
    assert project.installed() == AS_LOCKED | {"tool": VERSION, "peer": VERSION}

    before = project.index.add("library")
    project.write(
        "requirements.lock", project.lock.replace(before, project.index.add("library", "100"))
    )
    assert project.setup().returncode == 0
    assert project.installed() == AS_LOCKED | {"library": "100", "tool": VERSION, "peer": VERSION}


def test_a_file_that_is_not_the_locks_is_not_installed(project: Project) -> None:
    wheel = next(project.index.folder.glob("library-*.whl"))
    with zipfile.ZipFile(wheel, "a") as altered:
        altered.writestr("library_too.py", "")
    done = project.setup()
    assert done.returncode == 1
    assert "library" not in project.installed()
    assert "Hash mismatch" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: uv could not install the packages")


def test_torch_comes_from_the_index_that_was_named_and_stays(project: Project) -> None:
    for name in ("torch", "torchvision"):
        project.index.add(name, f"{VERSION}+cpu")
    done = project.setup(TORCH_INDEX=project.index.address + "cpu")
    assert done.returncode == 0, done.stderr
    assert project.installed() == CPU_BUILD
    assert project.setup("tests").returncode == 0
    assert project.installed() == CPU_BUILD | {"tool": VERSION}
    assert (project.folder / ".venv/torch").stat().st_mode & 0o077 == 0

    # Another choice is another environment.
    assert project.setup(TORCH_INDEX=project.index.address).returncode == 0
    assert project.installed()["torch"] == VERSION


@pytest.mark.skipif(
    bootstrap.has_nvidia_driver() or sys.platform != "linux",
    reason="the CPU build is for Linux without an NVIDIA driver",
)
def test_a_machine_without_a_driver_gets_the_cpu_build_if_its_index_answers(
    project: Project,
) -> None:
    for name in ("torch", "torchvision"):
        project.index.add(name, f"{VERSION}+cpu")
    project.index.seconds_until_cpu_answers = bootstrap.PROBE_SECONDS + 1
    done = project.setup()
    assert done.returncode == 0, done.stderr
    assert project.installed() == AS_LOCKED

    shutil.rmtree(project.folder / ".venv")
    project.index.seconds_until_cpu_answers = 0
    done = project.setup()
    assert done.returncode == 0, done.stderr
    assert project.installed() == CPU_BUILD
    assert "nvidia" not in "".join(p for p in project.index.asked[-40:] if "files" in p)
    assert project.setup().stdout == ""

    # A driver that came later.
    programs = project.folder / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").touch(mode=0o755)
    done = project.setup(PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert project.installed() == AS_LOCKED


@pytest.mark.parametrize("broken", ["python", "pip", "stopped"])
def test_a_broken_environment_is_mended(project: Project, broken: str) -> None:
    if broken == "stopped":
        (project.folder / ".venv").mkdir()
    else:
        assert project.setup().returncode == 0
    if broken == "python":
        (project.folder / ".venv/bin/python").unlink()
    if broken == "pip":
        shutil.rmtree(project.site / "pip")
        (project.folder / "requirements.lock").write_text(project.lock + "\n")
    done = project.setup()
    assert done.returncode == 0, done.stderr
    assert project.installed() == AS_LOCKED


def test_too_little_disk_is_said_before_the_download(project: Project) -> None:
    script = project.folder / "scripts/bootstrap.py"
    script.write_text(script.read_text().replace("(0.3, 0.9)", "(0.3, 1e9)"))
    done = project.setup()
    assert done.returncode == 1
    assert project.installed() == {}
    assert "GB are free on the disk of " in done.stderr


def test_ctrl_c_says_how_to_go_on(project: Project) -> None:
    project.index.seconds_until_cpu_answers = 60


def test_a_finished_installation_is_found_at_once() -> None:
    """Without another process: it takes a twentieth of a second, before every command."""


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
