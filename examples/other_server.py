"""Serves an archive with LitServe instead of TorchServe, with the same pipeline.

$ .venv/bin/python -m examples.other_server model_store/densenet121.mar 8000
$ curl -F file=@cat.jpg http://127.0.0.1:8000/predict
"""

import os
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import litserve
from fastapi import Request as HttpRequest
from fastapi import Response as HttpResponse

from handler.archive import Archive
from handler.inference.cores import Cores
from handler.pipeline import Pipeline
from handler.request import Request


class Service(litserve.LitAPI):
    """Accepts forms and JSON, as LitServe does, and responds like TorchServe."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def setup(self, device: str) -> None:
        """Load the model, once per worker."""
        archive = Archive.load(self._folder)
        self._pipeline = Pipeline(archive, Cores(1, 1, self._folder / "busy-workers"))

    def decode_request(self, request: HttpRequest) -> Request:
        """Turn a form or a JSON document into the pipeline's request."""
        options = self._pipeline.archive.options
        if isinstance(request, dict):
            headers: dict[str, Any] = {"content-type": "application/json"}
            return Request("-", {"body": request}, headers, options)
        row: dict[str, Any] = {}
        headers = {"content-type": "multipart/form-data"}
        for name, value in request.items():
            if hasattr(value, "file"):
                row[name] = value.file.read()
                headers[name] = {"content-type": value.content_type or "application/octet-stream"}
            else:
                row[name] = value
        return Request("-", row, headers, options)

    def predict(self, requests: list[Request]) -> list[Request]:
        """Run a batch through all stages; errors stay with their request."""
        self._pipeline.run(requests)
        return requests

    def encode_response(self, request: Request) -> HttpResponse:
        """Return the pipeline's body, status and headers."""
        response = request.response
        assert response is not None
        headers = dict(response.headers)
        return HttpResponse(response.body, response.status, headers, response.content_type)


def main(archive: str, port: str) -> None:
    """Serve until Ctrl-C."""
    with TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        service = Service(Path(folder), max_batch_size=8, batch_timeout=0.001)
        server = litserve.LitServer(service, accelerator="cpu", workers_per_device=os.cpu_count())
        server.run(host="127.0.0.1", port=int(port), generate_client_file=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
