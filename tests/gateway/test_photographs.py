"""Photographs with known content, through a gateway before a model with trained weights."""

from pathlib import Path

from benchmarks.cluster import free_options
from benchmarks.known import KNOWN
from scripts.gateway import start as starting
from scripts.gateway.nodes import start_nodes, stop_nodes
from tests.gateway.client import Client


def test_the_tutorials_address_recognizes_every_photograph(
    lite0_archive: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    nodes = start_nodes(1, lite0_archive, workers=1, run_dir=tmp_path)
    try:
        gateway = starting.start(free_options(rate=1000, burst=1000), nodes, folder, watch=False)
        client = Client(gateway)
        for known in KNOWN:
            answer = client.ask("POST", "/predict", files={"file": known.path.read_bytes()})
            assert answer.json()["class_name"] in known.labels, known.path.name
        starting.stop(gateway, folder)
    finally:
        stop_nodes(nodes)
