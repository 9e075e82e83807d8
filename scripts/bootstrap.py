"""Create .venv and install package groups in it: `bootstrap.py run tests`.

uv installs a group NAME from requirements/NAME.lock, by hash; this file creates .venv, installs uv
and chooses PyTorch's build. It uses the standard library only, and Python 3.6 can parse it.
"""

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

VENV = Path(".venv")
PYTHON, UV = VENV / "bin" / "python", VENV / "bin" / "uv"
LOCKS = Path("requirements")  # the groups are declared in pyproject.toml
CLIENT = Path("client")  # part of the run group, installed from its folder
NEEDS = {"huggingface": ["pytorch"], "timm": ["pytorch"], "precision": ["evaluation"]}
NEEDS.update(tests=["evaluation"], benchmarks=["pytorch", "evaluation"])

# File with the PyTorch build that .venv has: LOCKED, CPU, or the URL of a package index.
TORCH_BUILD = VENV / "torch"
LOCKED, CPU = "locked", "cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
# Settings of pip and uv that must not affect .venv; those of indexes and certificates are kept.
_OTHERS = r"USER|TARGET|PREFIX|ROOT|OVERRIDE|REQUIRE|NO_BUILD|\w*(BINARY|CONSTRAINT|PYTHON)"
FOREIGN = rf"PYTHON|(PIP|UV)_({_OTHERS}|DRY_RUN|EXCLUDE_NEWER)"
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--target="]
TORCH, CUDA = "torch|torchvision", "triton|nvidia-.+|cuda-.+"

# MB to download and MB on disk, see docs/get-started/install.md.
SIZES = {"run": "250 and 600", "lite0": "20 and 20", "evaluation": "100 and 300"}
WITH_CUDA, WITHOUT_CUDA, OTHER_GROUP = "3000 and 5500", "350 and 1100", "300 and 800"


def main() -> None:
    """Install the groups that are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    declared = re.findall(r"requirements/(\w+)\.in", Path("pyproject.toml").read_text())
    parser.add_argument("groups", nargs="+", choices=declared)
    groups = ["run"]
    for group in parser.parse_args().groups:
        groups += [*NEEDS.get(group, []), group]
    installed = TORCH_BUILD.read_text() if TORCH_BUILD.exists() else ""
    build = os.environ.get("TORCH_INDEX") or installed
    build = LOCKED if build == CPU and has_nvidia_driver() else build
    if "pytorch" in groups and installed not in ("", build):
        stamp_of("pytorch").write_text("another build")
    if all(is_installed(group) for group in groups):
        return
    if not is_usable():
        create()
    if "PIP_INDEX_URL" in os.environ:  # uv uses pip's mirror too
        os.environ.setdefault("UV_DEFAULT_INDEX", os.environ["PIP_INDEX_URL"])
    for group in groups:
        if not is_installed(group):
            install(group, build)


def create() -> None:
    """Create .venv, which can be moved and copied with the project."""
    if sys.version_info < (3, 10):
        version = sys.version.split()[0]
        sys.exit(f"Error: Python 3.10 or newer is required, not {version}. Set PYTHON=python3.12")
    execute(sys.executable, "-m", "venv", "--clear", str(VENV))
    with (VENV / "pyvenv.cfg").open("a") as config:
        config.write("relocatable = true\n")  # scripts then use the Python in their folder


def is_installed(group: str) -> bool:
    """Return whether a group is installed from its current lock, without starting a process."""
    stamp = stamp_of(group)
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == fingerprint(group)


def stamp_of(group: str) -> Path:
    """Return the file that holds the fingerprint of an installed group."""
    return VENV / f"installed-{group}"


def fingerprint(group: str) -> str:
    """Return a digest that changes when the group must be installed again."""
    contents = [(LOCKS / f"{group}.lock").read_bytes(), os.fsencode(os.path.realpath(str(PYTHON)))]
    if group == "run":
        contents.append((CLIENT / "pyproject.toml").read_bytes())
    return hashlib.sha256(b"".join(contents)).hexdigest()


def is_usable() -> bool:
    """Return whether .venv has pip and Python 3.10 or newer, and can run them."""
    command = [str(PYTHON), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 10))"]
    return PYTHON.exists() and subprocess.call(command, stderr=subprocess.DEVNULL) == 0


def has_nvidia_driver() -> bool:
    """Return whether an NVIDIA driver is installed."""
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def choose_torch_build() -> str:
    """Return CPU on Linux without an NVIDIA driver, if PyTorch's CPU index answers; else LOCKED."""
    if not sys.platform.startswith("linux") or has_nvidia_driver():
        return LOCKED
    try:
        urllib.request.urlopen(CPU_INDEX, timeout=3).close()
    except OSError:
        return LOCKED
    return CPU


def install(group: str, build: str) -> None:
    """Install a group; if this is interrupted, the next run installs the rest."""
    by_hash = ["--require-hashes", "--build-constraints", str(LOCKS / "run.lock"), "-r"]
    steps = [[*by_hash, str(LOCKS / f"{group}.lock")]]
    sizes = SIZES.get(group, OTHER_GROUP)
    stamp_of(group).write_text("unfinished")
    if group == "run":
        uv = write_packages("run", "uv.txt", "uv")
        execute(str(PYTHON), *PIP, f"--prefix={VENV.resolve()}", "--require-hashes", "-r", uv)
        steps.append(["--offline", "--editable", str(CLIENT)])
    if group == "pytorch":
        build = build or choose_torch_build()
        TORCH_BUILD.touch(mode=0o600)  # a URL can contain a password
        TORCH_BUILD.write_text(build)
        sizes = WITH_CUDA if build == LOCKED else WITHOUT_CUDA
        if build != LOCKED:
            # Other builds have the lock's versions, but other hashes and no CUDA packages.
            index = ["--torch-backend", CPU] if build == CPU else ["--default-index", build]
            torch = write_packages(group, "torch.txt", TORCH, hashes=False)
            others = write_packages(group, "without-torch.txt", f"(?!({TORCH}|{CUDA})$).*")
            steps = [[*index, "-r", torch], [*by_hash, others]]
        steps[0][:0] = ["--reinstall-package=torch", "--reinstall-package=torchvision"]
    print(f"==> Packages: {group}, up to {sizes} MB to download and on disk", flush=True)
    for step in steps:
        execute(str(UV), "pip", "install", "--python", str(PYTHON), "--no-deps", *step)
    for path in VENV.glob("lib/python*/site-packages/classification_client.pth"):
        path.write_text("../../../../client\n")  # relative, so the project can be moved
    stamp_of(group).write_text(fingerprint(group))


def write_packages(group: str, file: str, names: str, *, hashes: bool = True) -> str:
    """Write a lock's packages whose names match a pattern to .venv; return the path."""
    packages = re.split(r"^(?=\w)", (LOCKS / f"{group}.lock").read_text(), flags=re.MULTILINE)
    text = "".join(p for p in packages if p and re.fullmatch(names, p.split("==")[0]))
    (VENV / file).write_text(text if hashes else re.sub(r"\\\n *--hash=\S+ *", "", text))
    return str(VENV / file)


def execute(*command: str) -> None:
    """Run a program that prints its own errors; exit if it fails."""
    ours = {name: value for name, value in os.environ.items() if not re.match(FOREIGN, name)}
    # PIP_USER and PIP_CONSTRAINT override the values in pip's configuration files.
    if subprocess.call(command, env={**ours, "PIP_USER": "0", "PIP_CONSTRAINT": os.devnull}) != 0:
        sys.exit("Error: not installed, for the reason above. Fix it and run the command again.")


if __name__ == "__main__":
    # Shells start background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(str(Path(__file__).resolve().parent.parent))
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped by Ctrl-C. Run the same command again to resume.\n")
        sys.exit(130)
