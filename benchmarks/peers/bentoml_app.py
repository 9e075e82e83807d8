"""BentoML: a service with adaptive batching, one worker per core."""

from typing import Any

import bentoml
import numpy as np
from PIL import Image as PillowImage

from benchmarks.peers.common import BATCH, WORKERS, answer, crop, session

LATENCY_MS = 10_000


@bentoml.service(workers=WORKERS, traffic={"timeout": 60, "max_concurrency": 256})
class Classifier:
    """Takes uploads in `images`, returns JSON."""

    def __init__(self) -> None:
        self.session = session(threads=1)

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=LATENCY_MS)
    def predict(self, images: list[PillowImage.Image]) -> list[dict[str, Any]]:
        """Classify a batch of decoded images."""
        batch = np.stack([crop(image) for image in images])
        return [answer(row) for row in self.session.run(["logits"], {"images": batch})[0]]
