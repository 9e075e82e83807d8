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
from contextlib import suppress
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
FOREIGN = r"USER|TARGET|PREFIX|ROOT|DRY_RUN|REQUIRE|EXCLUDE|NO_BUILD|OVERRIDE"
FOREIGN += r"|\w*(BINARY|CONSTRAINT|PYTHON)"
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
    if "pytorch" in groups and TORCH_BUILD.exists() and TORCH_BUILD.read_text() != torch_build():
        stamp_of("pytorch").write_text("another build")
    if all(is_installed(group) for group in groups):
        return
    has_pip = [str(PYTHON), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 10))"]
    if not PYTHON.exists() or subprocess.call(has_pip, stderr=subprocess.DEVNULL) != 0:
        create()
    for group in groups:
        if not is_installed(group):
            install(group)


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
    contents = (LOCKS / f"{group}.lock").read_bytes() + os.fsencode(os.path.realpath(str(PYTHON)))
    if group == "run":
        contents += (CLIENT / "pyproject.toml").read_bytes()
    return hashlib.sha256(contents).hexdigest()


def has_nvidia_driver() -> bool:
    """Return whether an NVIDIA driver is installed."""
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def torch_build() -> str:
    """Return the PyTorch build that .venv must have; empty if it is not chosen yet."""
    build = os.environ.get("TORCH_INDEX") or (TORCH_BUILD.exists() and TORCH_BUILD.read_text())
    return LOCKED if build == CPU and has_nvidia_driver() else build or ""


def choose_torch_build() -> str:
    """Return CPU on Linux without an NVIDIA driver, if PyTorch's CPU index answers; else LOCKED."""
    with suppress(OSError):
        if sys.platform.startswith("linux") and not has_nvidia_driver():
            urllib.request.urlopen(CPU_INDEX, timeout=3).close()
            return CPU
    return LOCKED


def install(group: str) -> None:
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
        build = torch_build() or choose_torch_build()
        write(TORCH_BUILD.name, build)
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
    return write(file, text if hashes else re.sub(r"\\\n *--hash=\S+ *", "", text))


def write(name: str, text: str) -> str:
    """Write a file of .venv that only this user can read: a URL can contain a password."""
    (VENV / name).touch(mode=0o600)
    (VENV / name).write_text(text)
    return str(VENV / name)


def execute(*command: str) -> None:
    """Run a program that prints its own errors; exit if it fails."""
    foreign = f"PYTHON|(PIP|UV)_({FOREIGN})"
    ours = {name: value for name, value in os.environ.items() if not re.match(foreign, name)}
    # These override the values in pip's configuration files.
    ours.update(PIP_USER="0", PIP_DRY_RUN="0", PIP_CONSTRAINT=os.devnull)
    if "PIP_INDEX_URL" in ours:  # uv uses pip's mirror too
        ours.setdefault("UV_DEFAULT_INDEX", ours["PIP_INDEX_URL"])
    if UV.exists():
        ours["UV_CONFIG_FILE"] = write("uv.toml", uv_settings())
    if subprocess.call(command, env=ours) != 0:
        sys.exit("Error: not installed, for the reason above. Fix it and run the command again.")


def uv_settings() -> str:
    """Return the user's, or else the machine's uv.toml, without settings that are FOREIGN."""
    own = os.environ.get("XDG_CONFIG_HOME", "~/.config") + "/uv/uv.toml"
    paths = (os.environ.get("UV_CONFIG_FILE", ""), own, "/etc/uv/uv.toml")
    files = (Path(path).expanduser() for path in paths)
    text = next((file.read_text() for file in files if file.is_file()), "")
    settings = re.split(r"^(?=[\w\[])", text, flags=re.MULTILINE)
    return "".join(s for s in settings if not re.match(FOREIGN, s.replace("-", "_").upper()))


if __name__ == "__main__":
    # Shells start background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(str(Path(__file__).resolve().parent.parent))
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped by Ctrl-C. Run the same command again to resume.\n")
        sys.exit(130)
