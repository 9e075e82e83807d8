"""TorchServe's entry point: a thin adapter between TorchServe and the pipeline."""

import handler  # noqa: F401, I001  # sets variables before ONNX Runtime is imported

import logging
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ts.context import Context

from handler.archive import Archive
from handler.deadline import Deadlines
from handler.inference.allocator import keep_freed_memory
from handler.inference.cores import Cores
from handler.metrics import Metrics
from handler.pipeline import Pipeline
from handler.request import Request

logger = logging.getLogger(__name__)


class DenseNetHandler:
    """Classifies images: `initialize` once per worker, then `handle` once per batch."""

    def initialize(self, context: Context) -> None:
        """Load the archive; raise `ArchiveError` if a part is missing or malformed."""
        _restore_priority()
        properties = context.system_properties
        model_dir = Path(properties["model_dir"])
        self.batch_size = int(properties["batch_size"])
        archive = Archive.from_parts(
            model_dir, context.manifest["model"], context.model_yaml_config, context.model_name
        )
        share = _threads("OMP_NUM_THREADS", 1)
        # One file for all workers that share the cores: those of all models, or of all servers.
        busy = Path(os.environ.get("BUSY_WORKERS", model_dir.parent / "busy-workers"))
        self.cores = Cores(share, _threads("MAX_THREADS", share), busy)
        deadlines = Deadlines.from_environment()
        self.pipeline = Pipeline(archive, self.cores, properties.get("gpu_id"), deadlines)
        self.metrics = Metrics(context, archive, self.pipeline.engine.precision)
        # After loading, so that the memory that loading took is returned to the kernel.
        keep_freed_memory()
        self.initialized = True
        logger.info("Ready: %s on %s", archive.card.architecture, self.pipeline.engine.name)

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[bytes]:
        """Return the encoded bodies of the responses to a batch of requests.

        `data` has the parts of each, name to value. TorchServe's context has their headers, and
        receives statuses and response headers.
        """
        options = self.pipeline.archive.options
        requests = [
            Request(context.get_request_id(i), row, context.get_all_request_header(i), options)
            for i, row in enumerate(data)
        ]
        # A full batch means that more requests are in the queue.
        with self.cores.busy(queue_not_empty=len(data) >= self.batch_size):
            times = self.pipeline.run(requests)
        bodies = [self._send(request, i, context) for i, request in enumerate(requests)]
        self.metrics.record(requests, times)
        return bodies

    def _send(self, request: Request, index: int, context: Context) -> bytes:
        response = request.response
        assert response is not None
        context.set_response_content_type(index, response.content_type)
        for name, value in {**response.headers, **self._model_headers()}.items():
            context.set_response_header(index, name, value)
        # The phrase must be ASCII: TorchServe sends its number of characters as the byte length.
        context.set_response_status(response.status, HTTPStatus(response.status).phrase, index)
        return response.body

    def _model_headers(self) -> dict[str, str]:
        archive = self.pipeline.archive
        headers = {
            "x-model-weights": "trained" if archive.card.trained else "untrained",
            "x-model-name": archive.name,
            "x-model-version": self.metrics.model_version,
            "x-model-precision": self.pipeline.engine.precision,
        }
        if archive.card.multilabel:
            headers["x-model-activation"] = archive.card.activation
        return headers


def _threads(variable: str, default: int) -> int:
    """Return a number of CPU threads from the environment, as `scripts.serve` sets it.

    `OMP_NUM_THREADS` is a worker's share, `MAX_THREADS` its limit while the others are idle.
    """
    try:
        return max(1, int(os.environ.get(variable, default)))
    except ValueError:
        return default


def _restore_priority() -> None:
    """Set the parent's CPU priority, or log a warning if the process lacks the privilege.

    Java's event loops run at the lowest one (see `lower_event_loop_priority` in
    `scripts/serve/server.py`), and a worker that the management API adds inherits it.
    """
    parent = os.getpriority(os.PRIO_PROCESS, os.getppid())
    if os.getpriority(os.PRIO_PROCESS, 0) <= parent:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, parent)
    except PermissionError:
        logger.warning(
            "This worker has a lower priority than the others, since it was added by the "
            "management API. Restart the server with WORKERS=... to give all the same."
        )
