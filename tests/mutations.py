"""Mutation tests: break one place of the product at a time, and report what `make test` notices.

    .venv/bin/python -m tests.mutations [NUMBER ...]

In a copy of the repository, the likeliest test module runs first, then the rest of `make test`,
until one test fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.workspace import copy_project

# test_mutations.py fails on each mutation, since it checks that the original text exists.
_UNIT = ("tests/unit", "--numprocesses=logical", "--ignore=tests/unit/test_mutations.py")
_REST = ("--ignore=tests/unit", "--require-integration")
_MIN_NOTICED = 36


@dataclass(frozen=True)
class Mutation:
    """A replacement of text in a file of the product.

    Attributes:
        file: the file.
        old, new: its text, and the replacement of the first occurrence.
        first: NAME of the module that runs first, tests/unit/test_NAME.py, or FOLDER/NAME.
    """

    file: str
    old: str
    new: str
    first: str


# A line per mutation: the fields of `Mutation`.
_TABLE = """
# From rows to images and options
handler/protocols/json_body.py | images > max_images | images >= max_images | inputs
handler/protocols/__init__.py | get("explain") == "True" | get("explain") == "no" | inputs
handler/protocols/accept.py | weight > others or | weight >= others or | inputs
handler/protocols/forms.py | int(length) > accounted + slack | False | inputs
handler/protocols/kserve_v2.py | math.prod(shape) != elements | False | kserve
handler/protocols/kserve_v2.py | if len(elements) > max_images: | if False: | kserve
# Decoding
handler/decoding/decode.py | budget.take(*header.size) | pass | images
handler/decoding/pillow.py | elif image.size != tuple(task.size): | elif False: | decoding_limits
handler/decoding/transform.py | int(short * size[1] | int(2 * short * size[1] | fit
handler/decoding/transform.py | rounded((width - crop) / 2.0) | rounded((width - crop) / 3) | images
handler/decoding/transform.py | width - right, width - left | left, right | images
handler/decoding/pillow.py | + fixed > DECODING_BYTES | < 0 | decoding_limits
handler/decoding/child.py | resource.setrlimit( | (lambda *_: None)( | decoding_limits
handler/decoding/jpeg.py | _LOOK_AHEAD if in_one_scan | bytes(9999) if in_one_scan | images
# Inference
handler/pipeline.py | self._run_engine([alone], extra) | 1 / 0 | handler
handler/pipeline.py | np.isfinite(a).all() | True | handler
handler/pipeline.py | step = self.archive.settings.max_batch | step = 99 | handler
handler/inference/cores.py | max(share, everything) | min(share, everything) | cores
handler/inference/cores.py | == fcntl.F_UNLCK | != fcntl.F_UNLCK | cores
handler/inference/explain.py | / np.float32(positions) | * 1 | explain
handler/inference/precision.py | mismatches <= MAX_MISMATCHES | True | reduced_precision
# Responses
handler/inference/activation.py | - logits.max( | + logits.max( | responses
handler/results.py | probabilities, options.threshold) | probabilities, 1) | multilabel
handler/results.py | if (size := count * | if False and (size := count * | responses
handler/errors.py | status=415 | status=400 | corpus
handler/errors.py | status=413 | status=400 | corpus
handler/page.py | html.escape(json.dumps(values), quote=False) | json.dumps(values) | page
handler/settings.py | if not low <= value <= high: | if value < low: | settings
# Building archives
scripts/build/sources/download.py | sha256(target).startswith(match[1]) | True | download
scripts/build/state_dicts.py | if not np.isfinite(tensor).all(): | if False: | state_dicts
scripts/build/export.py | images.float() / 255 | images.float() / 256 | pipeline
scripts/build/pipeline.py | elif outputs not in {None, len(labels)}: | elif False: | pipeline
scripts/build/guard.py | > limits.max_loss | > 100 | guard
# Serving
scripts/serve/machine.py | max(1, cpus // workers) | cpus | preflight
scripts/serve/server.py | else _unreachable_grpc_address() | else HOST | integration/commands
scripts/gateway/nginx.conf.jinja | if ($client = "") | if ($client = "x") | gateway/access
scripts/serve/commands.py | and not card.trained | and card.trained | pipeline
# The gateway and the evaluation
scripts/gateway/keys.py | status.st_mode & ( | status.st_mode & 0 & ( | keys
scripts/gateway/nginx.conf.jinja | 500 502 507 = @again | 502 = @again | gateway/retries
scripts/evaluation/single_label.py | self.predictions[:, 0] | self.predictions[:, 1] | evaluation
"""
MUTATIONS = tuple(
    Mutation(*line.split(" | ")) for line in _TABLE.strip().splitlines() if line[0] != "#"
)


def main() -> int:
    """Try each mutation; return 1 if too few are noticed."""
    numbers = [int(text) for text in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        copy_project(copy)
        if Path("build").exists():  # earlier exports
            shutil.copytree("build", copy / "build")
        for number in numbers:
            mutation = MUTATIONS[number - 1]
            rows.append(_try(mutation, copy))
            cells = (f"`{text.strip()}`" for text in (mutation.file, mutation.old, mutation.new))
            print("|", number, "|", *(f"{cell} |" for cell in cells), rows[-1] or "not noticed")
            sys.stdout.flush()
    noticed = sum(map(bool, rows))
    print(f"{noticed} of {len(rows)} were noticed.")
    return 0 if noticed >= _MIN_NOTICED * len(rows) / len(MUTATIONS) else 1


def _try(mutation: Mutation, copy: Path) -> str:
    """Return the test that failed; empty if none did."""
    path = copy / mutation.file
    original = path.read_text()
    assert mutation.old in original, f"{mutation.file} has no {mutation.old!r}"
    path.write_text(original.replace(mutation.old, mutation.new, 1))
    try:
        folder, _, name = mutation.first.rpartition("/")
        runs = ((f"tests/{folder or 'unit'}/test_{name}.py",), _UNIT, _REST)
        return next(filter(None, (_first_failure(copy, run) for run in runs)), "")
    finally:
        path.write_text(original)


def _first_failure(copy: Path, options: tuple[str, ...]) -> str:
    command = (".venv/bin/python", "-m", "pytest", "-x", "-q", "-m", "not slow", *options)
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("PYTEST")}
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ""
    lines = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED tests", "ERROR tests"))
    ]
    assert lines, done.stdout + done.stderr
    return lines[0].split(" - ")[0].split(" ", 1)[1]


if __name__ == "__main__":
    sys.exit(main())
