"""Run a batch of requests through all stages: parse -> decode -> infer -> respond.

The pipeline does not depend on the server: TorchServe's handler, the batch job and
`examples/other_server` use it.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from handler import protocols, results
from handler.archive import Archive
from handler.deadline import Deadlines
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode, run_all
from handler.errors import ArchiveError, InternalError
from handler.inference import explain
from handler.inference.activation import to_probabilities, top_label
from handler.inference.cores import Cores
from handler.inference.engines import Extra
from handler.inference.precision import load_with_fallback
from handler.page import PAGE, load_page
from handler.request import (
    Body,
    Options,
    Purpose,
    Request,
    RequestImage,
    Response,
    json_response,
    run_isolated,
)
from handler.settings import MODEL_CARD

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """Durations of a batch's stages, in seconds."""

    decoding: float
    inference: float


class Pipeline:
    """Classifies images, explains predictions and computes embeddings, for batches of requests.

    Attributes:
        archive: the served archive.
        fallback: the reason for serving float32 instead of the archive's precision, or empty.
    """

    def __init__(
        self,
        archive: Archive,
        cores: Cores,
        gpu: int | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Load the model and run it once; `gpu` is the GPU's number, if any.

        Raises:
            ArchiveError: a part is missing, malformed, or does not fit the model.
        """
        self.archive = archive
        self._cores = cores
        self._deadlines = deadlines or Deadlines()
        self._pools = {
            threads: ThreadPoolExecutor(threads)
            for threads in {cores.share, cores.all}
            if threads > 1
        }
        self.engine, self.fallback = load_with_fallback(
            archive.model_file,
            archive.card,
            cores,
            gpu=gpu,
            required=archive.settings.require_precision,
        )
        self._classifier = None
        if archive.card.features:
            path = archive.model_file.with_name(explain.CLASSIFIER)
            self._classifier = explain.load_classifier(path, archive.card.classes)
        self._page = load_page(PAGE, archive)
        self._warm_up()

    def run(self, requests: Sequence[Request]) -> Times:
        """Set the response of each request; an error in one request or image affects no other."""
        begun = time.monotonic()
        self._deadlines.start_batch()
        for request in requests:
            run_isolated(request, self._deadlines.check)
            run_isolated(request, lambda one: protocols.parse(one, self.archive))
        started = time.monotonic()
        self.decode(requests)
        decoded = time.monotonic()
        images = [image for request in requests for image in request.images]
        self.infer(images)
        inferred = time.monotonic()
        for request in requests:
            run_isolated(request, self.respond)
            if request.response is None:
                error = request.error or InternalError(request.request_id)
                body = {**results.error_body(error), **self.archive.warning}
                request.response = json_response(body, error.status)
        self._deadlines.end_batch(time.monotonic() - begun, len(images))
        return Times(decoded - started, inferred - decoded)

    def decode(self, requests: Sequence[Request]) -> None:
        """Decode the images of all requests; each image gets its pixels or its error."""
        card, settings = self.archive.card, self.archive.settings

        def decode_one(image: RequestImage, budget: PixelBudget, preview_side: int | None) -> None:
            image.decoded = decode(
                image.data,
                card.preprocessing,
                budget,
                reduced=settings.reduced_decoding,
                fast_resize=card.fast_resize,
                preview_side=preview_side,
            )

        jobs = []
        for request in requests:
            if request.error is None:
                budget = PixelBudget(settings.max_pixels, settings.max_seconds)
                side = explain.MAX_SIDE if request.heat_map else None
                stage = partial(decode_one, budget=budget, preview_side=side)
                jobs += [partial(run_isolated, image, stage) for image in request.images]
        run_all(jobs, self._pools.get(self._cores.available()))

    def infer(self, images: Sequence[RequestImage]) -> None:
        """Run the model; each image gets its probabilities and the extra output that it needs.

        The model runs on at most `max_batch` images at once; more would take gigabytes of memory,
        which the worker would keep. If it fails on several, it runs on each of them alone.
        """
        step = self.archive.settings.max_batch
        ready = [image for image in images if image.error is None and image.decoded is not None]
        for extra in (None, *Extra):
            same = [image for image in ready if image.extra is extra]
            for start in range(0, len(same), step):
                self._infer_batch(same[start : start + step], extra)

    def _infer_batch(self, images: Sequence[RequestImage], extra: Extra | None) -> None:
        try:
            self._run_engine(images, extra)
        except Exception:
            logger.warning("Failed on %d images; now one by one", len(images), exc_info=True)
            for image in images:
                run_isolated(image, lambda alone: self._run_engine([alone], extra))

    def _run_engine(self, images: Sequence[RequestImage], extra: Extra | None) -> None:
        pixels = np.stack([image.decoded.pixels for image in images if image.decoded is not None])
        outputs = self.engine.run(pixels, extra)
        for i, image in enumerate(images):
            arrays = [outputs.logits[i], *([] if extra is None else [outputs.extra[i]])]
            run_isolated(image, partial(self._store, arrays=arrays))

    def _store(self, image: RequestImage, arrays: Sequence[NDArray[np.float32]]) -> None:
        if not all(np.isfinite(a).all() for a in arrays):
            raise ValueError("the model's output is not finite")
        logits, *extra = arrays
        image.probabilities = to_probabilities(logits, self.archive.card)
        image.extra_output = extra[0] if extra else None

    def respond(self, request: Request) -> None:
        """Format the response in the request's protocol."""
        match request.purpose:
            case Purpose.WEB_UI:
                request.response = self._page
            case Purpose.DESCRIBE:
                request.response = json_response({**self._description(), **self.archive.warning})
            case _:
                request.response = self._respond_to_images(request)

    def _respond_to_images(self, request: Request) -> Response:
        card = self.archive.card
        results.check_result_count(request, card.classes, multilabel=card.multilabel)
        for image in request.images:
            if image.error is None:
                self.fill_result(image, request.options, request.class_index)
        first = request.images[0]
        if len(request.images) == 1 and first.error is not None:
            raise first.error
        if request.heat_map:
            response = self._heat_map(first)
        else:
            assert request.protocol is not None
            response = request.protocol.format(request, self.archive)
        results.check_response_size(response)
        return response

    def fill_result(
        self, image: RequestImage, options: Options, class_index: int | None = None
    ) -> None:
        """Set an image's result from its probabilities; see `handler.results`."""
        assert image.probabilities is not None
        labels = self.archive.labels
        if image.extra is Extra.FEATURES:
            if class_index is None:
                class_index = top_label(image.probabilities, options.threshold)
            assert image.decoded is not None
            image.result = results.explanation(
                image.decoded,
                self._activation(image, class_index),
                labels[class_index],
                class_index,
                float(image.probabilities[class_index]),
            )
            return
        image.result = results.classification(
            image.probabilities, labels, options, multilabel=self.archive.card.multilabel
        )
        if options.embedding and image.extra_output is not None:
            image.result["embedding"] = results.embedding_to_json(image.extra_output)

    def _activation(self, image: RequestImage, class_index: int) -> NDArray[np.float32]:
        assert image.extra_output is not None
        assert self._classifier is not None
        return explain.class_activation_map(image.extra_output, self._classifier[class_index])

    def _heat_map(self, image: RequestImage) -> Response:
        assert image.decoded is not None
        assert image.result is not None
        png = explain.heat_map(image.decoded, self._activation(image, image.result["class_index"]))
        return results.heat_map_response(png, image.result)

    def _description(self) -> Body:
        """Return the response to `GET /models/{name}?customized=true` of the management API."""
        card = self.archive.card
        return {
            "architecture": card.architecture,
            "classes": card.classes,
            "trained": card.trained,
            "weights_file": card.weights_file,
            "weights_sha256": card.weights_sha256,
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "archive_precision": card.precision,
            "activation": card.activation,
            "thresholds": card.thresholds,
            "fallback": self.fallback or None,
            "explains": self._classifier is not None,
            "embedding": card.embedding,
            "preprocessing": asdict(card.preprocessing),
            "settings": asdict(self.archive.settings),
        }

    def _warm_up(self) -> None:
        """Run the model once: a wrong model file fails at start, and the first request is fast."""
        card = self.archive.card
        crop = card.preprocessing.crop
        black = np.zeros((1, 3, crop, crop), np.uint8)
        checks: list[tuple[Extra | None, int, str]] = [
            (None, card.classes, f"{MODEL_CARD} says {card.classes} classes")
        ]
        if self._classifier is not None:
            channels = self._classifier.shape[1]
            source = f"{explain.CLASSIFIER} has {channels} weights per class"
            checks.append((Extra.FEATURES, channels, source))
        if card.embedding:
            source = f"{MODEL_CARD} says {card.embedding} channels"
            checks.append((Extra.EMBEDDING, card.embedding, source))
        for extra, length, source in checks:
            outputs = self.engine.run(black, extra)
            shape = (outputs.logits if extra is None else outputs.extra).shape
            dimensions = 4 if extra is Extra.FEATURES else 2
            if shape[:2] != (1, length) or len(shape) != dimensions:
                name = "logits" if extra is None else extra.value
                raise ArchiveError(f"the model gives {name} of shape {shape}, {source}")
