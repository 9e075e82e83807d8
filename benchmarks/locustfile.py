"""Open loop for one server: requests come at their pace, however slow the answers are.

BENCHMARK_BODY is a file with the request's body, BENCHMARK_TYPE its content type, BENCHMARK_RATE
the requests a second of one user. The pace holds as long as there are users left to ask.
"""

import os
from pathlib import Path

from locust import FastHttpUser, constant_throughput, task

BODY = Path(os.environ["BENCHMARK_BODY"]).read_bytes()
TYPE = os.environ["BENCHMARK_TYPE"]
RATE = float(os.environ["BENCHMARK_RATE"])
PATH = os.environ["BENCHMARK_PATH"]


class Client(FastHttpUser):
    """One client with a connection of its own."""

    wait_time = constant_throughput(RATE)

    @task
    def classify(self) -> None:
        self.client.post(PATH, data=BODY, headers={"Content-Type": TYPE})
