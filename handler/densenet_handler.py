"""The entry that TorchServe loads: one class that takes a batch of requests through the stages."""

import handler  # noqa: F401, I001  # before ONNX Runtime is imported, see there

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ts.context import Context

from handler import explain, inputs, responses
from handler.allocator import keep_freed_memory
from handler.cores import Cores
from handler.errors import ArchiveError, ClientError, InternalError, NoEmbedding, NoExplanation
from handler.exchange import (
    EMBEDDING,
    Body,
    Options,
    Purpose,
    Request,
    RequestImage,
    Response,
    attempt,
    together,
)
from handler.images import Decoder, Job, Photo, PixelBudget, decode, decode_all, decode_photo
from handler.labels import CLASS_INDEX, load_class_index
from handler.metrics import Metrics, Times
from handler.multilabel import foremost, sigmoid
from handler.page import PAGE, load_page
from handler.precision import load_precise
from handler.responses import softmax
from handler.settings import MODEL_CARD, ModelCard, Settings

logger = logging.getLogger(__name__)


class DenseNetHandler:
    """Classifies images: `initialize` once a worker, then `handle` once a batch.

    A batch is what TorchServe queued up, requests of several clients mixed. Whatever goes wrong
    with one request or image stays in its place (see `exchange`) and never touches its neighbours.
    """

    def initialize(self, context: Context) -> None:
        """Loads the archive's parts; raises `ArchiveError` where one is missing or malformed."""
        model_dir = Path(context.system_properties["model_dir"])
        # As it is served, which may be another name than the archive's.
        self.served_as = (context.model_name, context.manifest["model"]["modelVersion"])
        self.batch_size = int(context.system_properties["batch_size"])
        self.settings = Settings.from_model_config(context.model_yaml_config)
        self.card = ModelCard.load(model_dir / MODEL_CARD)
        self.options = Options.defaults(self.settings, self.card)
        self.labels = load_class_index(model_dir / CLASS_INDEX, self.card.classes)
        share = _threads("OMP_NUM_THREADS", 1)
        # Beside the folders of the server's models, whose workers use the same cores.
        self.cores = Cores(share, _threads("MAX_THREADS", share), model_dir.parent / "busy-workers")
        self.pools = {
            threads: ThreadPoolExecutor(threads)
            for threads in {self.cores.share, self.cores.all}
            if threads > 1
        }
        self.engine, self.fallback = load_precise(
            model_dir / context.manifest["model"]["serializedFile"],
            self.card,
            self.cores,
            gpu=context.system_properties.get("gpu_id"),
            required=self.settings.require_precision,
        )
        self.classifier = (
            explain.load_classifier(model_dir / explain.CLASSIFIER, self.card.classes)
            if self.card.features
            else None
        )
        self.page = load_page(PAGE, self.card, self.settings, self.labels, self.served_as[0])
        self._warm_up()
        self.metrics = Metrics(context, self.card, self.engine.precision)
        # Not before: what loading took must go back.
        keep_freed_memory()
        self.initialized = True
        logger.info("Ready: %s on %s", self.card.architecture, self.engine.name)

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[bytes]:
        """Answers a batch of requests.

        Args:
            data: for each request its parts, name to value.
            context: TorchServe's view of the batch; takes the statuses and response headers.

        Returns:
            for each request, in order, an encoded body.
        """
        requests = [
            Request(
                context.get_request_id(i),
                row,
                context.get_all_request_header(i),
                self.options,
                self.card.multilabel,
            )
            for i, row in enumerate(data)
        ]
        # A full batch means that more requests are in the queue.
        with self.cores.busy(crowded=len(data) >= self.batch_size):
            times = self._work(requests)
        answers = [self._send(request, index, context) for index, request in enumerate(requests)]
        self.metrics.record(requests, times)
        return answers

    def _work(self, requests: Sequence[Request]) -> Times:
        """Takes the requests from their rows to their answers."""
        for request in requests:
            attempt(request, self._read)
        started = time.monotonic()
        together(requests, self._decode)
        decoded_at = time.monotonic()
        images = [image for request in requests if not request.error for image in request.images]
        classified = [image for image in images if image.photo is None]
        embedding = [request for request in requests if request.wants_embeddings]
        embedded = {id(image) for request in embedding for image in request.images}
        together([image for image in classified if id(image) not in embedded], self._classify)
        together([image for image in classified if id(image) in embedded], self._embed)
        together([image for image in images if image.photo is not None], self._explain)
        inferred_at = time.monotonic()
        for request in requests:
            attempt(request, self._answer)
        return Times(decoded_at - started, inferred_at - decoded_at)

    def _read(self, request: Request) -> None:
        inputs.read(request, self.settings, self.labels)
        if request.purpose is Purpose.EXPLAIN and self.classifier is None:
            raise NoExplanation(
                f"The architecture {self.card.architecture} has no class activation map: its "
                "logits are no linear function of its last features. DenseNets and ResNets, among "
                "others, have one."
            )
        if request.wants_embeddings and not self.card.embedding:
            raise NoEmbedding(
                "This archive gives no embeddings: it was built for PyTorch (engine: torch), or "
                "its last layer is no linear one. Those for ONNX Runtime of most architectures do."
            )
        responses.check_topk(request, self.card.classes)

    def _decode(self, requests: Sequence[Request]) -> None:
        """Decodes the images of all requests together."""
        sound = [
            (image, Job(image.data, budget, self._decoder(request)))
            for request in requests
            for budget in [PixelBudget(self.settings.max_pixels, self.settings.max_seconds)]
            for image in request.images
            if image.error is None
        ]
        pool = self.pools.get(self.cores.available())
        decode_all([job for _, job in sound], self.card.preprocessing, pool)
        for image, job in sound:
            if isinstance(job.error, ClientError):
                image.error = job.error
            elif job.error is not None:
                logger.error("Failed on request %s", image.request_id, exc_info=job.error)
                image.error = InternalError(image.request_id)
            elif isinstance(job.result, Photo):
                image.photo, image.pixels = job.result, job.result.pixels
            else:
                image.pixels = job.result

    def _decoder(self, request: Request) -> Decoder:
        reduced = self.settings.reduced_decoding
        if request.purpose is Purpose.EXPLAIN:
            longest_side = explain.LONGEST_SIDE if request.as_picture else None
            return partial(decode_photo, longest_side=longest_side, reduced=reduced)
        return partial(decode, reduced=reduced)

    def _classify(self, images: Sequence[RequestImage]) -> None:
        for batch, pixels in self._batches(images):
            for image, logits in zip(batch, self.engine.logits(pixels), strict=True):
                self._take(image, logits)

    def _embed(self, images: Sequence[RequestImage]) -> None:
        for batch, pixels in self._batches(images):
            found = zip(*self.engine.logits_and_embedding(pixels), strict=True)
            for image, (logits, embedding) in zip(batch, found, strict=True):
                self._take(image, logits, embedding=embedding)

    def _explain(self, images: Sequence[RequestImage]) -> None:
        for batch, pixels in self._batches(images):
            found = zip(*self.engine.logits_and_features(pixels), strict=True)
            for image, (logits, features) in zip(batch, found, strict=True):
                self._take(image, logits, features)

    def _batches(
        self, images: Sequence[RequestImage]
    ) -> Iterator[tuple[Sequence[RequestImage], NDArray[np.uint8]]]:
        """Images and their pixels for the model, in one batch unless several requests hold many:
        more than `max_batch` at once would take the worker gigabytes, which it would keep.
        """
        step = self.settings.max_batch
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            yield batch, np.stack([image.pixels for image in batch if image.pixels is not None])

    def _take(
        self,
        image: RequestImage,
        logits: NDArray[np.float32],
        features: NDArray[np.float32] | None = None,
        embedding: NDArray[np.float32] | None = None,
    ) -> None:
        """What the model made of one image.

        Args:
            image: takes it.
            logits: float32 (classes,).
            features: float32 (channels, height, width).
            embedding: float32 (channels,).
        """
        made = [values for values in (logits, features, embedding) if values is not None]
        if not all(np.isfinite(values).all() for values in made):
            logger.error("Not finite: the model's output for request %s", image.request_id)
            image.error = InternalError(image.request_id)
            return
        image.probabilities = sigmoid(logits) if self.card.multilabel else softmax(logits)
        image.features = features
        image.embedding = embedding

    def _answer(self, request: Request) -> None:
        match request.purpose:
            case Purpose.PAGE:
                response = self.page
            case Purpose.DESCRIBE:
                response = self._json(self._description())
            case _:
                response = self._answer_images(request)
        responses.check_size(response)
        request.response = response

    def _answer_images(self, request: Request) -> Response:
        responses.check_labels(request)
        for image in request.images:
            if image.error is not None:
                continue
            assert image.probabilities is not None
            if request.purpose is Purpose.CLASSIFY:
                answer = responses.multilabel if request.multilabel else responses.classification
                image.result = answer(image.probabilities, self.labels, request.options)
                if request.options.embedding and image.embedding is not None:
                    image.result[EMBEDDING] = responses.embedded(image.embedding)
                continue
            assert image.photo is not None
            assert image.features is not None
            assert self.classifier is not None
            index = request.class_index
            if index is None:
                index = (
                    foremost(image.probabilities, request.options.threshold)
                    if request.multilabel
                    else int(image.probabilities.argmax())
                )
            label, probability = self.labels[index], float(image.probabilities[index])
            activation = explain.class_activation_map(image.features, self.classifier[index])
            image.result = responses.explanation(image.photo, activation, label, index, probability)
            if request.as_picture:
                content = explain.heat_picture(image.photo, activation)
                return responses.picture(content, label, index, probability)
        return responses.collect(request, self.served_as, self._warning())

    def _json(self, body: Body) -> Response:
        return responses.encode({**body, **self._warning()})

    def _warning(self) -> Body:
        return {"warning": self.card.warning} if self.card.warning else {}

    def _send(self, request: Request, index: int, context: Context) -> bytes:
        if request.error is not None or request.response is None:
            error = request.error or InternalError(request.request_id)
            request.response = self._json(responses.error(error))
        answer = request.response
        context.set_response_content_type(index, answer.content_type)
        for name, value in answer.headers.items():
            context.set_response_header(index, name, value)
        context.set_response_header(
            index, "x-model-weights", "trained" if self.card.trained else "untrained"
        )
        context.set_response_header(index, "x-model-name", self.served_as[0])
        context.set_response_header(index, "x-model-version", self.metrics.model_version)
        context.set_response_header(index, "x-model-precision", self.engine.precision)
        if self.card.multilabel:
            context.set_response_header(index, "x-model-activation", self.card.activation)
        # The phrase must be ASCII: TorchServe counts its characters, but sends its bytes.
        context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, index)
        return answer.body

    def _description(self) -> Body:
        """The answer to `GET /models/{name}?customized=true` of the management API."""
        return {
            "architecture": self.card.architecture,
            "classes": self.card.classes,
            "trained": self.card.trained,
            "weights_file": self.card.weights_file,
            "weights_sha256": self.card.weights_sha256,
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "archive_precision": self.card.precision,
            "activation": self.card.activation,
            "thresholds": self.card.thresholds,
            "fallback": self.fallback or None,
            "explains": self.classifier is not None,
            "embedding": self.card.embedding,
            "preprocessing": asdict(self.card.preprocessing),
            "settings": asdict(self.settings),
        }

    def _warm_up(self) -> None:
        """Runs the model once: a wrong model file shows here, and the first client waits no longer
        than the second.
        """
        crop = self.card.preprocessing.crop
        black = np.zeros((1, 3, crop, crop), np.uint8)
        if self.classifier is None:
            logits = self.engine.logits(black)
        else:
            logits, features = self.engine.logits_and_features(black)
            if features.shape[1] != self.classifier.shape[1]:
                raise ArchiveError(
                    f"the model gives features of shape {features.shape}, "
                    f"{explain.CLASSIFIER} has {self.classifier.shape[1]} weights a class"
                )
        if self.card.embedding:
            embedding = self.engine.logits_and_embedding(black)[1]
            if embedding.shape != (1, self.card.embedding):
                raise ArchiveError(
                    f"the model gives embeddings of shape {embedding.shape}, "
                    f"{MODEL_CARD} says {self.card.embedding} channels"
                )
        if logits.shape != (1, self.card.classes):
            raise ArchiveError(
                f"the model gives logits of shape {logits.shape}, "
                f"{MODEL_CARD} says {self.card.classes} classes"
            )


def _threads(variable: str, default: int) -> int:
    """CPU threads from the environment, as `scripts.serve` sets it for this machine.

    `OMP_NUM_THREADS` is a worker's share, `MAX_THREADS` what it may use while others are idle.
    """
    try:
        return max(1, int(os.environ.get(variable, default)))
    except ValueError:
        return default
