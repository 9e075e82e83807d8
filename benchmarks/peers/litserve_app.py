"""LitServe: a FastAPI frontend and worker processes that batch."""

import sys
from typing import Any

import litserve
import numpy as np
from fastapi import Request

from benchmarks.peers.common import BATCH, BATCH_DELAY_MS, WORKERS, answer, decode, session


class Classifier(litserve.LitAPI):
    """Takes an upload in `file`, returns JSON."""

    def setup(self, device: str) -> None:
        self.session = session(threads=1)

    def decode_request(self, request: Request) -> Any:
        return decode(request["file"].file.read())

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        return self.session.run(["logits"], {"images": x})[0]

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, str]:
        return answer(output)


if __name__ == "__main__":
    litserve.LitServer(
        Classifier(max_batch_size=BATCH, batch_timeout=BATCH_DELAY_MS / 1000),
        accelerator="cpu",
        workers_per_device=WORKERS,
    ).run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
