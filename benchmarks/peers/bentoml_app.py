"""BentoML: an adaptive batching service, a worker a core."""

from typing import Any

import bentoml
import numpy as np
from PIL import Image as PillowImage

from benchmarks.peers.common import BATCH, WORKERS, answer, session

LATENCY_MS = 10_000


@bentoml.service(workers=WORKERS, traffic={"timeout": 60, "max_concurrency": 256})
class Classifier:
    """Takes an upload under `images`, answers JSON."""

    def __init__(self) -> None:
        self.session = session(threads=1)

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=LATENCY_MS)
    def predict(self, images: list[PillowImage.Image]) -> list[dict[str, Any]]:
        """A batch of decoded pictures."""
        batch = np.stack([_crop(image) for image in images])
        return [answer(row) for row in self.session.run(["logits"], {"images": batch})[0]]


def _crop(image: PillowImage.Image) -> Any:
    image = image.convert("RGB")
    scale = 255 / min(image.size)
    image = image.resize(
        (int(image.width * scale), int(image.height * scale)), PillowImage.Resampling.BILINEAR
    )
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)
