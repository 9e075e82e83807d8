"""How the tests ask a gateway."""

from dataclasses import dataclass
from typing import Any

import requests

from benchmarks.cluster import TIMEOUT
from scripts.gateway.gateway import Gateway
from scripts.samples import CAT


@dataclass(frozen=True)
class Client:
    """Sends requests to a gateway."""

    gateway: Gateway

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request over plain HTTP."""
        return requests.request(method, self.gateway.url + path, timeout=TIMEOUT, **options)

    def predict(self, key: str | None = None) -> requests.Response:
        """Classifies a photograph."""
        headers = {"X-API-Key": key} if key else {}
        return self.ask("POST", "/predict", files={"file": CAT.read_bytes()}, headers=headers)
