"""The entry that TorchServe loads: one class that takes a batch of requests through the stages."""

import handler  # noqa: F401, I001  # before ONNX Runtime is imported, see there

import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ts.context import Context

from handler import explain, responses
from handler.allocator import keep_freed_memory
from handler.cores import Cores
from handler.engines import load_engine
from handler.errors import ArchiveError, ClientError, NoExplanation
from handler.images import (
    Decoded,
    Decoder,
    Encoded,
    Photo,
    PixelBudget,
    Pixels,
    decode,
    decode_all,
    decode_photo,
)
from handler.inputs import (
    DescribeRequest,
    ExplainRequest,
    ImagesRequest,
    PageRequest,
    Request,
    read_request,
)
from handler.labels import CLASS_INDEX, load_class_index
from handler.metrics import Batch, Metrics
from handler.page import PAGE, load_page
from handler.responses import Body, Response, softmax
from handler.settings import MODEL_CARD, ModelCard, Settings

logger = logging.getLogger(__name__)


class DenseNetHandler:
    """Classifies images: `initialize` once a worker, then `handle` once a batch.

    A batch is what TorchServe queued up, requests of several clients mixed. Each stage keeps what
    went wrong with one request or image in that one's place, so that a bad request never touches
    its neighbours.
    """

    def initialize(self, context: Context) -> None:
        """Loads the archive's parts; raises `ArchiveError` where one is missing or malformed."""
        model_dir = Path(context.system_properties["model_dir"])
        self.manifest = context.manifest
        self.batch_size = int(context.system_properties["batch_size"])
        self.settings = Settings.from_model_config(context.model_yaml_config)
        self.card = ModelCard.load(model_dir / MODEL_CARD)
        self.labels = load_class_index(model_dir / CLASS_INDEX, self.card.classes)
        share = _threads("OMP_NUM_THREADS", 1)
        # Beside the folders of the server's models, whose workers use the same cores.
        self.cores = Cores(share, _threads("MAX_THREADS", share), model_dir.parent / "busy-workers")
        self.pools = {
            threads: ThreadPoolExecutor(threads)
            for threads in {self.cores.share, self.cores.all}
            if threads > 1
        }
        self.engine = load_engine(
            model_dir / context.manifest["model"]["serializedFile"],
            self.card,
            self.cores,
            gpu=context.system_properties.get("gpu_id"),
        )
        self.classifier = (
            explain.load_classifier(model_dir / explain.CLASSIFIER, self.card.classes)
            if self.card.features
            else None
        )
        self.page = load_page(PAGE, self.card, self.settings)
        self._warm_up()
        self.metrics = Metrics(context, self.card, self.settings)
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
        try:
            # A full batch means that more requests are in the queue.
            with self.cores.busy(crowded=len(data) >= self.batch_size):
                answers = self._classify(data, context)
        except Exception:
            # Nothing that a client sends may end up here: this is the server's own fault.
            ids = [context.get_request_id(index) for index in range(len(data))]
            logger.exception("Failed on requests %s", ", ".join(ids))
            self.metrics.failed(len(data))
            answers = [self._json(responses.internal_error(request_id)) for request_id in ids]
        return [self._send(answer, index, context) for index, answer in enumerate(answers)]

    def _classify(self, data: list[dict[str, Any]], context: Context) -> list[Response]:
        requests = [
            self._read(row, context.get_all_request_header(index)) for index, row in enumerate(data)
        ]
        started = time.monotonic()
        images = self._decode(requests)
        decoded_at = time.monotonic()
        probabilities = self._infer(images)
        explanations = list(self._explain(images))
        inferred_at = time.monotonic()
        remaining, unexplained = iter(probabilities), iter(explanations)
        answers = [
            self._answer(request, decoded, remaining, unexplained)
            for request, decoded in zip(requests, images, strict=True)
        ]
        seconds = (decoded_at - started, inferred_at - decoded_at)
        self.metrics.record(Batch(requests, images, probabilities, answers, *seconds), context)
        return answers

    def _read(self, row: Mapping[str, Any], headers: Mapping[str, Any]) -> Request | ClientError:
        try:
            request = read_request(row, headers, self.settings, self.labels)
        except ClientError as error:
            return error
        if isinstance(request, ExplainRequest) and self.classifier is None:
            return NoExplanation(
                f"A {self.card.architecture} has no class activation map: its logits are no linear "
                "function of its last features. DenseNets and ResNets, among others, have one."
            )
        return request

    def _decode(self, requests: list[Request | ClientError]) -> list[list[Decoded]]:
        """For each request, its images; those of all requests are decoded together."""
        pictures = [self._pictures(request) for request in requests]
        decoded = iter(
            decode_all(
                [picture for of_request in pictures for picture in of_request],
                self.card.preprocessing,
                self.pools.get(self.cores.available()),
            )
        )
        return [[next(decoded) for _ in of_request] for of_request in pictures]

    def _pictures(self, request: Request | ClientError) -> list[Encoded]:
        decoder: Decoder
        match request:
            case ImagesRequest():
                decoder = partial(decode, reduced=self.settings.reduced_decoding)
                parts = request.images
            case ExplainRequest(asked=asked, as_picture=as_picture):
                longest_side = explain.LONGEST_SIDE if as_picture else None
                decoder = partial(decode_photo, longest_side=longest_side)
                parts = asked.images
            case _:
                return []
        budget = PixelBudget(self.settings.max_pixels, self.settings.max_seconds)
        return [(part.data, budget, decoder) for part in parts]

    def _infer(self, images: list[list[Decoded]]) -> list[NDArray[np.float32]]:
        """All images of the batch to classify through the model: float32 (classes,) for each.

        In one call, unless several requests hold many images each: more than `max_batch` at once
        would take the worker gigabytes, which it would keep.
        """
        good = [image for decoded in images for image in decoded if isinstance(image, np.ndarray)]
        return [
            probabilities
            for batch in self._batches(good)
            for probabilities in softmax(self.engine.logits(batch))
        ]

    def _explain(self, images: list[list[Decoded]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        """All images to explain: float32 (classes,) and features (channels, height, width)."""
        good = [image.pixels for decoded in images for image in decoded if isinstance(image, Photo)]
        for batch in self._batches(good):
            logits, features = self.engine.logits_and_features(batch)
            yield from zip(softmax(logits), features, strict=True)

    def _batches(self, images: list[Pixels]) -> Iterator[Pixels]:
        step = self.settings.max_batch
        for start in range(0, len(images), step):
            yield np.stack(images[start : start + step])

    def _answer(
        self,
        request: Request | ClientError,
        images: list[Decoded],
        probabilities: Iterator[NDArray[np.float32]],
        explanations: Iterator[tuple[NDArray[np.float32], ...]],
    ) -> Response:
        """Takes as many of `probabilities` or `explanations` as the request has good images."""
        match request:
            case ClientError():
                return self._json(responses.error(request))
            case DescribeRequest():
                return self._json(self._description())
            case PageRequest():
                return self.page
            case ExplainRequest():
                return self._answer_explanation(request, images, explanations)
            case ImagesRequest():
                results = [
                    responses.error(image)
                    if isinstance(image, ClientError)
                    else responses.classification(next(probabilities), self.labels, request.options)
                    for image in images
                ]
                return self._json(responses.collect(request, results, self._model_names()))

    def _answer_explanation(
        self,
        request: ExplainRequest,
        images: list[Decoded],
        explanations: Iterator[tuple[NDArray[np.float32], ...]],
    ) -> Response:
        results: list[Body] = []
        for image in images:
            if not isinstance(image, Photo):
                assert isinstance(image, ClientError)
                results.append(responses.error(image))
                continue
            probabilities, features = next(explanations)
            index = (
                int(probabilities.argmax()) if request.class_index is None else request.class_index
            )
            label, probability = self.labels[index], float(probabilities[index])
            assert self.classifier is not None
            activation = explain.class_activation_map(features, self.classifier[index])
            if request.as_picture:
                content = explain.heat_picture(image, activation)
                return responses.picture(content, label, index, probability)
            results.append(responses.explanation(image, activation, label, index, probability))
        return self._json(
            responses.collect(request.asked, results, self._model_names(), explained=True)
        )

    def _model_names(self) -> tuple[str, str]:
        model = self.manifest["model"]
        return model["modelName"], model["modelVersion"]

    def _json(self, body: Body) -> Response:
        if self.card.warning:
            body = {**body, "warning": self.card.warning}
        return responses.encode(body)

    def _send(self, answer: Response, index: int, context: Context) -> bytes:
        context.set_response_content_type(index, answer.content_type)
        for name, value in answer.headers.items():
            context.set_response_header(index, name, value)
        context.set_response_header(
            index, "x-model-weights", "trained" if self.card.trained else "untrained"
        )
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
            "explains": self.classifier is not None,
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
        if logits.shape != (1, self.card.classes):
            raise ArchiveError(
                f"the model gives logits of shape {logits.shape}, "
                f"{MODEL_CARD} says {self.card.classes} classes"
            )


def _threads(variable: str, default: int) -> int:
    """CPU threads from the environment, as `scripts.server` sets it for this machine.

    `OMP_NUM_THREADS` is a worker's share, `MAX_THREADS` what it may use while others are idle.
    """
    try:
        return max(1, int(os.environ.get(variable, default)))
    except ValueError:
        return default
