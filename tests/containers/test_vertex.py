"""The image as Vertex AI runs it: its variables choose port and addresses."""

import base64
import json

from scripts.container.engine import Engine
from scripts.samples import sample_photographs
from scripts.serve.management import poll
from tests.containers.running import FENCED, READY_TIMEOUT, Container, container

PORT = 7080
HEALTH = "/v1/endpoints/12/deployedModels/34"
PREDICT = f"{HEALTH}:predict"
VARIABLES = {
    "AIP_HTTP_PORT": str(PORT),
    "AIP_HEALTH_ROUTE": HEALTH,
    "AIP_PREDICT_ROUTE": PREDICT,
    "AIP_STORAGE_URI": "",
}


def _wait(running: Container) -> None:
    def healthy() -> bool:
        try:
            return running.ask(HEALTH, port=PORT, timeout=5).status == 200
        except OSError:
            return False

    assert poll(healthy, READY_TIMEOUT), running.logs()


def test_its_port_and_addresses_answer_as_it_asks(engine: Engine, image: str) -> None:
    photo = base64.b64encode(next(iter(sample_photographs()))).decode()
    json_type = {"Content-Type": "application/json"}
    with container(
        engine, image, options=FENCED, environment=VARIABLES, ports=(PORT,), until=_wait
    ) as running:
        for key in ("data", "b64"):
            body = {"instances": [{key: photo}, {key: photo}], "parameters": {"topk": 1}}
            answer = running.ask(PREDICT, json.dumps(body).encode(), json_type, port=PORT)
            assert answer.status == 200, answer.body
            predictions = answer.json()["predictions"]
            assert [len(one["predictions"]) for one in predictions] == [1, 1]
        bad = json.dumps({"instances": [{"data": "bm8gcGljdHVyZQ=="}]}).encode()
        refused = running.ask(PREDICT, bad, json_type, port=PORT)
        assert (refused.status, refused.json()["type"]) == (400, "NotAnImage")


def test_what_would_have_to_be_fetched_is_refused(engine: Engine, image: str) -> None:
    variables = {**VARIABLES, "AIP_STORAGE_URI": "gs://bucket/model"}
    with container(
        engine, image, options=FENCED, environment=variables, ports=(PORT,), until=None
    ) as refused:
        assert poll(lambda: not refused.runs(), 60)
        assert refused.state()["ExitCode"] == 1
        assert "this image fetches nothing" in refused.logs()
