"""The image as a KServe runtime: a mounted model store, every endpoint, KServe's own clients."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.container import open_inference_pb2 as messages
from scripts.container.engine import Engine
from scripts.samples import CAT
from scripts.serve.management import poll
from tests.containers.mounts import OTHER, other_archive, readable
from tests.containers.running import FENCED, Container, container

CLIENTS = Path("tests/clients")
MOUNT = "/mnt/models"
GRPC_PORT = 9000
# As in KServe's documents, with more rights than the image gives.
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


@pytest.fixture
def picture() -> Path:
    """A photograph; larger than the mounted configuration would let in."""
    return CAT


@pytest.fixture(scope="module")
def store(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `storageUri` leads to: KServe's layout, with another archive than the image's."""
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
            # What people set for KServe's own runtime must not replace the image's rules.
            "TS_CONFIG_FILE": f"{MOUNT}/config/config.properties",
            "TS_SERVICE_ENVELOPE": "kserve",
        },
        ports=(8080, GRPC_PORT),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with KServe's and Triton's own clients."""
    folder = tmp_path_factory.mktemp("clients")
    uv, python = Path(sys.executable).with_name("uv"), folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    lock = CLIENTS / "requirements.lock"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", lock],
        check=True,
    )
    return python


def test_what_is_mounted_serves_and_not_the_images_own(pod: Container, picture: Path) -> None:
    assert pod.ask("/v1/models").json() == {"models": ["cats"]}
    answer = pod.ask("/predictions/cats", picture.read_bytes())
    assert answer.status == 200
    assert answer.json()["predictions"][0]["label"].startswith(OTHER)
    assert pod.ask("/predictions/densenet121", picture.read_bytes()).status == 404


def test_the_mounted_configuration_gives_no_rights(pod: Container, picture: Path) -> None:
    """Its limit of 1,000 bytes would refuse the picture; its address would show the management."""
    assert len(picture.read_bytes()) > 1000
    assert pod.ask("/predictions/cats", picture.read_bytes()).status == 200
    assert pod.ask("/models").status != 200
    described = pod.execute("python", "-c", _ASK_MANAGEMENT)
    model = json.loads(described)[0]
    assert model["batchSize"] > 1
    registered = pod.execute("cat", "/tmp/densenet/config.properties")  # noqa: S108
    assert "-Xmx64g" not in registered
    assert "enable_model_api=false" in registered


_ASK_MANAGEMENT = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8081/models/cats').read().decode())"


def test_every_endpoint_of_v1_and_v2(pod: Container, picture: Path) -> None:
    encoded = base64.b64encode(picture.read_bytes()).decode()
    json_type = {"Content-Type": "application/json"}

    def post(path: str, body: Any) -> Any:
        answer = pod.ask(path, json.dumps(body).encode(), json_type)
        assert answer.status == 200, (path, answer.body)
        return answer.json()

    def get(path: str) -> Any:
        answer = pod.ask(path)
        assert answer.status == 200, (path, answer.body)
        return answer.json()

    v1 = {"instances": [{"b64": encoded}]}
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [encoded]}
    assert get("/") == {"status": "alive"}
    assert get("/v1/models/cats") == {"name": "cats", "ready": True}
    assert post("/v1/models/cats:predict", v1)["predictions"][0]["success"]
    assert post("/v1/models/cats:explain", v1)["explanations"][0]["success"]
    assert get("/v2")["extensions"] == ["binary_tensor_data"]
    assert get("/v2/health/live") == {"live": True}
    assert get("/v2/health/ready") == {"ready": True}
    assert get("/v2/models") == {"models": ["cats"]}
    metadata = get("/v2/models/cats")
    (version,) = metadata["versions"]
    for path in ("/v2/models/cats", f"/v2/models/cats/versions/{version}"):
        assert get(path) == metadata
        assert get(f"{path}/ready") == {"name": "cats", "ready": True}
        outputs = post(f"{path}/infer", {"inputs": [tensor]})["outputs"]
        told = [{key: output[key] for key in ("name", "datatype")} for output in outputs]
        assert told == [{k: o[k] for k in ("name", "datatype")} for o in metadata["outputs"]]
        assert post(f"{path}/explain", {"inputs": [tensor]})["model_name"] == "cats"
    for path in ("/v1/models/dogs", "/v2/models/dogs/ready", "/v2/models/cats/versions/9/infer"):
        answer = pod.ask(path)
        assert (answer.status, answer.json()["type"]) == (404, "NotFound"), path


@pytest.mark.parametrize("client", ["kserve", "triton"])
def test_its_own_clients(pod: Container, clients: Path, picture: Path, client: str) -> None:
    addresses = [f"127.0.0.1:{pod.ports[port]}" for port in (8080, GRPC_PORT)]
    done = subprocess.run(
        [clients, CLIENTS / "ask.py", client, *addresses, "cats", picture],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    best = pod.ask("/predictions/cats", picture.read_bytes()).json()["predictions"][0]
    expected = EXPECTED[client]
    for name, wanted in expected.items():
        value = best.get(wanted, wanted) if isinstance(wanted, str) else wanted
        if "error" in name or name.endswith("unknown model"):
            assert value in said[name], name
        elif isinstance(value, float):
            assert said[name] == pytest.approx(value, abs=1e-6), name
        else:
            assert said[name] == value, name
    assert not set(said) - set(expected), "a call that is not looked at"


# What each call says; the name of a field stands for what the best prediction has there.
_NO_PICTURE = "The bytes are not a picture"
_NOT_HERE = "There is no such model"
_TRITON: dict[str, Any] = {
    "live": True,
    "ready": True,
    "model ready": True,
    "unknown model ready": "no error, but False",
    "server": "torchserve",
    "version": "1.0-untrained",
    "input": "images",
    "infer": "class_id",
    "infer of a version": "class_id",
    "infer of octets": "class_id",
    "class name": "label",
    "probability": "probability",
    "not asked for": True,
    "error": _NO_PICTURE,
    "unknown model": _NOT_HERE,
}
EXPECTED: dict[str, dict[str, Any]] = {
    "kserve": {
        "v1 live": True,
        "v1 model ready": True,
        "v1 unknown model": _NOT_HERE,
        "v1 predict": "class_id",
        "v1 explain": "class_id",
        "v1 error": _NO_PICTURE,
        "v2 live": True,
        "v2 ready": True,
        "v2 model ready": True,
        "v2 unknown model ready": False,
        "v2 infer": "class_id",
        "v2 id": "42",
        "grpc live": True,
        "grpc ready": True,
        "grpc model ready": True,
        "grpc infer": "class_id",
        "grpc id": "42",
        "grpc unknown model": _NOT_HERE,
        "grpc error": _NO_PICTURE,
    },
    "triton": {
        **_TRITON,
        **{f"grpc {name}": value for name, value in _TRITON.items()},
        # Over gRPC an unknown model is an error of the call's own.
        "grpc unknown model ready": "InferenceServerException: [StatusCode.NOT_FOUND] There "
        "is no such model, version or address here.",
    },
}


def test_of_torchserves_own_grpc_nothing_can_be_reached(pod: Container) -> None:
    """Its streams end workers; a call is answered by the image's own server, or not at all."""
    with grpc.insecure_channel(f"127.0.0.1:{pod.ports[GRPC_PORT]}") as channel:
        for name in (
            "org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions",
            "org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer",
            "org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels",
        ):
            call: Any = channel.unary_unary(f"/{name}")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=30)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, name


def test_a_message_over_grpc_is_bounded_as_a_body_is(pod: Container) -> None:
    request = messages.ModelInferRequest(model_name="cats")
    request.inputs.add(name="images", datatype="BYTES", shape=[1])
    call = "/inference.GRPCInferenceService/ModelInfer"
    with grpc.insecure_channel(f"127.0.0.1:{pod.ports[GRPC_PORT]}") as channel:
        infer: Any = channel.unary_unary(call, lambda message: message.SerializeToString())
        for size, status in (
            # nginx's bound, which counts the JSON too, and that of a message.
            (20 << 20, grpc.StatusCode.INVALID_ARGUMENT),
            (22 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            request.raw_input_contents[:] = [bytes(size)]
            with pytest.raises(grpc.RpcError) as refused:
                infer(request, timeout=60)
            assert refused.value.code() is status
    assert pod.ready()


def test_grpc_is_closed_unless_it_is_asked_for(served: Container) -> None:
    listening = served.execute("python", "-c", _LISTENING)
    assert "8080" in listening
    assert str(GRPC_PORT) not in listening


_LISTENING = (
    "import psutil; print({c.laddr.port for c in psutil.net_connections() if c.status == 'LISTEN'})"
)


def test_a_broken_layout_is_refused_with_a_sentence(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    (tmp_path / "model-store").mkdir()
    (tmp_path / "model-store" / "pets.mar").write_bytes(b"half an archive")
    options = (*FENCED, f"--volume={readable(tmp_path)}:{MOUNT}:ro")
    with container(engine, image, options=options, until=None) as broken:
        assert poll(lambda: not broken.runs(), 60)
        assert broken.state()["ExitCode"] == 1
        assert "Error: /mnt/models/model-store/pets.mar is no model archive" in broken.logs()
