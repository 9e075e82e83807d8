"""Thousands of pictures, corrupt and hostile ones among them: every row is the server's answer.

$ .venv/bin/python -m tests.stress.batch
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import requests
import typer

from benchmarks.batch import SMALL, batch, make_pictures, server_of
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.terminal import command, step
from tests import corpus
from tests.batch.command import differs

# One of so many is cut off.
_CUT = 50


def main(
    count: Annotated[int, typer.Option(help="Pictures, beside the hostile ones.")] = 5_000,
) -> int:
    """Classifies them twice, by Ray and by a server, and compares; 1 where a row differs."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = build(recipe(untrained()), work / "store")
        pictures = make_pictures(work / "pictures", SMALL, count)
        random = np.random.default_rng(2)
        for number in random.choice(count, count // _CUT, replace=False):
            path = pictures / f"{number:06}.jpg"
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content[: random.integers(100, len(content) // 2)])
        for number, hostile in enumerate(corpus.hostile()):
            (pictures / f"hostile-{number:03}.jpg").write_bytes(hostile.data)
        batch(archive, pictures, work / "results")
        rows: list[dict[str, Any]] = pq.read_table(work / "results").to_pylist()
        with server_of(archive, work / "run") as server, requests.Session() as session:
            differing = [row["path"] for row in rows if differs(row, session, server)]
    refused = Counter(row["error_type"] for row in rows if row["error_type"])
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(refused.items()))
    step(f"{len(rows):,} rows, {len(differing)} differ from the server's answer; refused: {found}")
    for path in differing[:10]:
        step(f"  {path}")
    return int(bool(differing))


if __name__ == "__main__":
    command(main)
