"""The image as a KServe runtime: mounted model store, endpoints, clients of KServe and Triton."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.container.open_inference import messages
from scripts.container.engine import Engine
from scripts.samples import CAT
from scripts.store import PACKAGED_ARCHITECTURE
from tests.containers.running import FENCED, OTHER, Container, container, other_archive, readable
from tests.environments import environment

CLIENTS = Path("tests/clients")
MOUNT = "/mnt/models"
GRPC_PORT = 9000
MANAGEMENT = "http://127.0.0.1:8081/models/cats"
# As in KServe's documentation, with more permissions than the image grants.
CONFIG = """\
inference_address=http://0.0.0.0:8085
management_address=http://0.0.0.0:8085
metrics_address=http://0.0.0.0:8082
enable_envvars_config=true
install_py_dep_per_model=true
enable_model_api=true
max_request_size=1000
vmargs=-Xmx64g
load_models=all
model_store=/mnt/models/model-store
model_snapshot={"name": "startup.cfg", "modelCount": 1, "models": {"cats": {"1.0": \
{"defaultVersion": true, "marName": "pets.mar", "minWorkers": 5, "batchSize": 1}}}}
"""


@pytest.fixture(scope="module")
def store(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `storageUri` in KServe's layout, with another archive than the image's."""
    root = tmp_path_factory.mktemp("models")
    for folder in ("config", "model-store"):
        (root / folder).mkdir()
    (root / "config" / "config.properties").write_text(CONFIG)
    other_archive(archive, root / "model-store" / "pets.mar")
    return readable(root)


@pytest.fixture(scope="module")
def pod(engine: Engine, image: str, store: Path) -> Iterator[Container]:
    """A container as KServe starts it, with gRPC."""
    with container(
        engine,
        image,
        options=(*FENCED, f"--volume={store}:{MOUNT}:ro"),
        environment={
            "GRPC": "on",
            # Settings for KServe's own runtime must not override the image's.
            "TS_CONFIG_FILE": f"{MOUNT}/config/config.properties",
            "TS_SERVICE_ENVELOPE": "kserve",
        },
        ports=(8080, GRPC_PORT),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the clients of KServe and Triton."""
    lock = Path("requirements/clients.lock").absolute()
    return environment(tmp_path_factory.mktemp("clients"), lock)


def test_the_mounted_model_is_served_and_the_mounted_configuration_grants_nothing(
    pod: Container,
) -> None:
    assert pod.ask("/v1/models").json() == {"models": ["cats"]}
    # Larger than the mounted configuration would accept.
    photo = CAT.read_bytes()
    assert len(photo) > 1000
    answer = pod.ask("/predictions/cats", photo)
    assert answer.status == 200
    assert answer.json()["predictions"][0]["label"].startswith(OTHER)
    assert pod.ask(f"/predictions/{PACKAGED_ARCHITECTURE}", photo).status == 404
    # The mounted address would show the management API.
    assert pod.ask("/models").status != 200
    script = f"import urllib.request as r; print(r.urlopen('{MANAGEMENT}').read().decode())"
    (model,) = json.loads(pod.execute("python", "-c", script))
    assert model["batchSize"] > 1
    registered = pod.execute("cat", "/tmp/densenet/config.properties")
    assert "-Xmx64g" not in registered
    assert "enable_model_api=false" in registered


def test_a_models_paths_with_and_without_its_version_are_equal(pod: Container) -> None:
    def answer(path: str, body: Any = None, status: int = 200) -> Any:
        data = None if body is None else json.dumps(body).encode()
        found = pod.ask(path, data, {"Content-Type": "application/json"})
        assert found.status == status, (path, found.body)
        return found.json()

    encoded = base64.b64encode(CAT.read_bytes()).decode()
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [encoded]}
    metadata = answer("/v2/models/cats")
    kinds = [(output["name"], output["datatype"]) for output in metadata["outputs"]]
    for path in ("/v2/models/cats", f"/v2/models/cats/versions/{metadata['versions'][0]}"):
        assert answer(path) == metadata
        assert answer(f"{path}/ready") == {"name": "cats", "ready": True}
        outputs = answer(f"{path}/infer", {"inputs": [tensor]})["outputs"]
        assert [(output["name"], output["datatype"]) for output in outputs] == kinds
        assert answer(f"{path}/explain", {"inputs": [tensor]})["model_name"] == "cats"
    for path in ("/v1/models/dogs", "/v2/models/dogs/ready", "/v2/models/cats/versions/9/infer"):
        assert answer(path, status=404)["type"] == "NotFound"


# The result of each call; the name of a field stands for its value in the top-1 prediction.
_READY: dict[str, Any] = {"live": True, "ready": True, "model ready": True}
_UNKNOWN = {"unknown model": "There is nothing here"}
_ERROR = {"error": "The bytes are not an image"}
_INFER = {"infer": "class_id", "id": "42"}
_BOTH = {
    **_READY,
    "unknown model ready": "no error, but False",
    "server": "torchserve",
    "version": "1.0-untrained",
    "input": "images",
    **dict.fromkeys(("infer", "infer of a version", "infer of octets"), "class_id"),
    "class name": "label",
    "probability": "probability",
    "not asked for": True,
    **_ERROR,
    **_UNKNOWN,
}
_KSERVE = {
    "v1 ": {"live": True, "model ready": True, "predict": "class_id", "explain": "class_id"}
    | _UNKNOWN
    | _ERROR,
    "v2 ": {**_READY, "unknown model ready": False, **_INFER},
    "grpc ": {**_READY, **_INFER, **_UNKNOWN, **_ERROR},
}
# Over gRPC an unknown model is an error of the call.
_NOT_FOUND = (
    "InferenceServerException: [StatusCode.NOT_FOUND] There is nothing here. Send images to "
    "/predict."
)
_TRITON = {"": _BOTH, "grpc ": {**_BOTH, "unknown model ready": _NOT_FOUND}}


@pytest.mark.parametrize(("client", "calls"), [("kserve", _KSERVE), ("triton", _TRITON)])
def test_the_clients_of_kserve_and_triton(
    pod: Container, clients: Path, client: str, calls: dict[str, dict[str, Any]]
) -> None:
    addresses = [f"127.0.0.1:{pod.ports[port]}" for port in (8080, GRPC_PORT)]
    command: list[str | Path] = [clients, CLIENTS / "ask.py", client, *addresses, "cats", CAT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    best = pod.ask("/predictions/cats", CAT.read_bytes()).json()["predictions"][0]
    expected = {f"{way}{call}": value for way, of in calls.items() for call, value in of.items()}
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        value = best.get(wanted, wanted) if isinstance(wanted, str) else wanted
        if "error" in name or name.endswith("unknown model"):
            assert value in found[name], name
        elif isinstance(value, float):
            assert found[name] == pytest.approx(value, abs=1e-6), name
        else:
            assert found[name] == value, name


def test_a_grpc_message_is_limited_like_a_body(pod: Container) -> None:
    request = messages.ModelInferRequest(model_name="cats")
    request.inputs.add(name="images", datatype="BYTES", shape=[1])
    call = "/inference.GRPCInferenceService/ModelInfer"
    with grpc.insecure_channel(f"127.0.0.1:{pod.ports[GRPC_PORT]}") as channel:
        infer: Any = channel.unary_unary(call, lambda message: message.SerializeToString())
        for size, status in (
            # nginx's limit, which includes the JSON, and gRPC's limit of a message.
            (20 << 20, grpc.StatusCode.INVALID_ARGUMENT),
            (22 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            request.raw_input_contents[:] = [bytes(size)]
            with pytest.raises(grpc.RpcError) as rejected:
                infer(request, timeout=60)
            assert rejected.value.code() is status
    assert pod.ready()
