"""The entry that TorchServe loads: one class that takes a batch of requests through the stages."""

import handler  # noqa: F401, I001  # before TorchServe imports ONNX Runtime, see there

import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handler import responses
from handler.engines import load_engine
from handler.errors import ArchiveError, ClientError
from handler.images import PixelBudget, decode
from handler.inputs import DescribeRequest, ImagesRequest, read_request
from handler.labels import CLASS_INDEX, load_class_index
from handler.metrics import Batch, Metrics
from handler.responses import Body, Response, softmax
from handler.settings import MODEL_CARD, ModelCard, Settings

logger = logging.getLogger(__name__)

Request = ImagesRequest | DescribeRequest

# One image on its way: uint8 (3, crop, crop), or what is wrong with it.
Pixels = NDArray[np.uint8]


class DenseNetHandler(BaseHandler):  # type: ignore[misc]  # TorchServe has no types
    """Classifies images: `initialize` once a worker, then `handle` once a batch.

    A batch is what TorchServe queued up, requests of several clients mixed. Each stage keeps what
    went wrong with one request or image in that one's place, so that a bad request never touches
    its neighbours.
    """

    def initialize(self, context: Context) -> None:
        """Loads the archive's parts; raises `ArchiveError` where one is missing or malformed."""
        model_dir = Path(context.system_properties["model_dir"])
        self.manifest = context.manifest
        self.settings = Settings.from_model_config(context.model_yaml_config)
        self.card = ModelCard.load(model_dir / MODEL_CARD)
        self.labels = load_class_index(model_dir / CLASS_INDEX, self.card.classes)
        self.engine = load_engine(
            model_dir / context.manifest["model"]["serializedFile"],
            self.card,
            threads=_threads(),
            device=_device(context.system_properties.get("gpu_id")),
        )
        self._warm_up()
        self.metrics = Metrics(context, self.card, self.settings)
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
            requests = [
                self._read(row, context.get_all_request_header(index))
                for index, row in enumerate(data)
            ]
            started = time.monotonic()
            images = [self._decode(request) for request in requests]
            decoded_at = time.monotonic()
            probabilities = self._infer(images)
            inferred_at = time.monotonic()
            remaining = iter(probabilities)
            answers = [
                self._answer(request, decoded, remaining)
                for request, decoded in zip(requests, images, strict=True)
            ]
            seconds = (decoded_at - started, inferred_at - decoded_at)
            batch = Batch(requests, images, probabilities, answers, *seconds)
            self.metrics.record(batch, context)
        except Exception:
            # Nothing that a client sends may end up here: this is the server's own fault.
            ids = [context.get_request_id(index) for index in range(len(data))]
            logger.exception("Failed on requests %s", ", ".join(ids))
            self.metrics.failed(len(data))
            answers = [self._json(responses.internal_error(request_id)) for request_id in ids]
        return [self._send(answer, index, context) for index, answer in enumerate(answers)]

    def _read(self, row: Mapping[str, Any], headers: Mapping[str, Any]) -> Request | ClientError:
        try:
            return read_request(row, headers, self.settings)
        except ClientError as error:
            return error

    def _decode(self, request: Request | ClientError) -> list[Pixels | ClientError]:
        if not isinstance(request, ImagesRequest):
            return []
        budget = PixelBudget(self.settings.max_pixels)
        return [self._decode_one(part.data, budget) for part in request.images]

    def _decode_one(
        self, data: bytes | bytearray | ClientError, budget: PixelBudget
    ) -> Pixels | ClientError:
        if isinstance(data, ClientError):
            return data
        try:
            return decode(data, self.card.preprocessing, budget)
        except ClientError as error:
            return error

    def _infer(self, images: list[list[Pixels | ClientError]]) -> list[NDArray[np.float32]]:
        """All good images of the batch through the model: float32 (classes,) for each.

        In one call, unless several requests hold many images each: more than `max_batch` at once
        would take the worker gigabytes, which it would keep.
        """
        good = [
            image for decoded in images for image in decoded if not isinstance(image, ClientError)
        ]
        step = self.settings.max_batch
        return [
            probabilities
            for start in range(0, len(good), step)
            for probabilities in softmax(self.engine.logits(np.stack(good[start : start + step])))
        ]

    def _answer(
        self,
        request: Request | ClientError,
        images: list[Pixels | ClientError],
        probabilities: Iterator[NDArray[np.float32]],
    ) -> Response:
        """Takes as many of `probabilities` as the request has good images."""
        if isinstance(request, ClientError):
            return self._json(responses.error(request))
        if isinstance(request, DescribeRequest):
            return self._json(self._description())
        results = [
            responses.error(image)
            if isinstance(image, ClientError)
            else responses.classification(next(probabilities), self.labels, request.options)
            for image in images
        ]
        model = self.manifest["model"]
        names = (model["modelName"], model["modelVersion"])
        return self._json(responses.collect(request, results, names))

    def _json(self, body: Body) -> Response:
        if self.card.warning:
            body = {**body, "warning": self.card.warning}
        return responses.encode(body)

    def _send(self, answer: Response, index: int, context: Context) -> bytes:
        context.set_response_content_type(index, answer.content_type)
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
            "preprocessing": asdict(self.card.preprocessing),
            "settings": asdict(self.settings),
        }

    def _warm_up(self) -> None:
        """Runs the model once: a wrong model file shows here, and the first client waits no longer
        than the second.
        """
        crop = self.card.preprocessing.crop
        logits = self.engine.logits(np.zeros((1, 3, crop, crop), np.uint8))
        if logits.shape != (1, self.card.classes):
            raise ArchiveError(
                f"the model gives logits of shape {logits.shape}, "
                f"{MODEL_CARD} says {self.card.classes} classes"
            )


def _threads() -> int:
    """CPU threads for one forward pass: `OMP_NUM_THREADS`, as everywhere in this field, else 1.

    One thread a worker and a worker a core gave the best throughput; see the README.
    """
    try:
        return max(1, int(os.environ.get("OMP_NUM_THREADS", "1")))
    except ValueError:
        return 1


def _device(gpu_id: int | None) -> str:
    """TorchServe gives each worker a GPU where there is one."""
    return f"cuda:{gpu_id}" if gpu_id is not None and torch.cuda.is_available() else "cpu"
