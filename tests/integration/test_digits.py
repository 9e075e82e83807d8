"""The example of a model of one's own, from training to serving, in a short form."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_served_digits_are_as_accurate_as_the_trained_ones(
    tmp_path: Path, note: list[str]
) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "examples.digits", "--folder", str(tmp_path)),
            *("--epochs", "2", "--least", "0.5"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.findall(r"Accuracy (in PyTorch|served) +([\d.]+)% of 360", result.stdout)
    assert [where for where, _ in found] == ["in PyTorch", "served"]
    assert found[0][1] == found[1][1]
    assert len(list((tmp_path / "test").iterdir())) == 10
    note.append(f"digits, two epochs: {found[1][1]} % served, as in PyTorch")
