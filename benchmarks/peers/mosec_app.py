"""mosec: a Rust frontend; decoding and inference in worker processes that batch."""

from typing import Any

import numpy as np
from mosec import Server, Worker

from benchmarks.peers.common import BATCH, BATCH_DELAY_MS, WORKERS, answer, decode, session


class Classifier(Worker):
    """Takes raw bytes, returns JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.session = session(threads=1)

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[dict[str, Any]]:
        images = np.stack([decode(one) for one in data])
        return [answer(row) for row in self.session.run(["logits"], {"images": images})[0]]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Classifier, num=WORKERS, max_batch_size=BATCH, max_wait_time=BATCH_DELAY_MS
    )
    server.run()
