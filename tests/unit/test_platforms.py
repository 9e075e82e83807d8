"""What hosting platforms mount and say, and what the container makes of it."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.container import open_inference, platforms
from deploy.container import open_inference_pb2 as messages
from deploy.container.grpc_server import Calls, Failed, to_http
from deploy.container.serving import Refused, Serving
from handler import kserve
from scripts.serve.running import unused_ports

NOWHERE = Path("/nowhere")
SNAPSHOT = '{"models": {"cats": {"1.0": {"marName": "pets.mar", "minWorkers": 1}}}}'


def _archive(path: Path, name: str = "densenet121", version: str = "1.0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = {"model": {"modelName": name, "modelVersion": version}}
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return path


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image's own model store."""
    store = tmp_path / "own"
    _archive(store / "densenet121.mar")
    monkeypatch.setattr("deploy.container.serving.MODEL_STORE", store)
    return store


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """KServe's, with two archives and a configuration that asks for more than it gets."""
    root = tmp_path / "models"
    _archive(root / "model-store" / "pets.mar", version="2.0")
    _archive(root / "model-store" / "flowers.mar")
    _configure(root, "inference_address=http://0.0.0.0:8085", "enable_model_api=true")
    return root


def _configure(root: Path, *lines: str) -> None:
    (root / "config").mkdir(exist_ok=True)
    (root / "config" / "config.properties").write_text("# comment\n" + "\n".join(lines) + "\n")


def _on_kserve(root: Path) -> Serving:
    return platforms.serving_on([], {}, root, NOWHERE)


def _on_sagemaker(folder: Path) -> Serving:
    return platforms.serving_on(["serve"], {}, NOWHERE, folder)


def _on_vertex(variables: Mapping[str, str]) -> Serving:
    return platforms.serving_on([], variables, NOWHERE, NOWHERE)


def test_the_images_own_archive_serves_where_nothing_is_mounted(own: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for serving in (
        _on_kserve(NOWHERE),
        _on_sagemaker(tmp_path / "empty"),
        _on_vertex({"AIP_STORAGE_URI": ""}),
    ):
        assert serving.archives == (own / "densenet121.mar",)
        assert serving.models == ("densenet121",)


def test_of_kserves_layout_only_the_choice_of_models_is_taken(
    layout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = _on_kserve(layout)
    assert serving.models == ("flowers", "pets")
    assert serving.model_store == layout / "model-store"
    assert serving.port == 8080
    assert not serving.properties
    assert "not inference_address, enable_model_api" in capsys.readouterr().out
    shutil.rmtree(layout / "config")
    assert _on_kserve(layout).models == ("flowers", "pets")


@pytest.mark.parametrize(
    ("line", "models"),
    [
        ("load_models=all", ("flowers", "pets")),
        ("load_models=pets.mar", ("pets",)),
        ("load_models=cats=pets.mar, flowers.mar", ("cats", "flowers")),
        (f"model_snapshot={SNAPSHOT}", ("cats",)),
    ],
)
def test_kserves_configuration_chooses_and_names_models(
    layout: Path, line: str, models: tuple[str, ...]
) -> None:
    _configure(layout, line)
    assert _on_kserve(layout).models == models


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("load_models=dogs.mar", "holds no dogs.mar"),
        ("load_models=http://elsewhere/pets.mar", "cannot be the name"),
        ("load_models=../own/densenet121.mar", "cannot be the name"),
        ('load_models=a"b;=pets.mar', "cannot be the name"),
        ("model_snapshot={", "model_snapshot must be JSON"),
        ('model_snapshot={"models": {}}', "names no model"),
        ('model_snapshot={"models": {"cats": {"1.0": {"marName": 7}}}}', "cannot be the name"),
    ],
)
def test_a_broken_configuration_is_rejected(layout: Path, line: str, sentence: str) -> None:
    _configure(layout, line)
    with pytest.raises(Refused, match=sentence):
        _on_kserve(layout)


def test_a_broken_layout_is_rejected(layout: Path) -> None:
    store = layout / "model-store"
    (store / "pets.mar").write_bytes(b"half an archive")
    with pytest.raises(Refused, match=r"pets\.mar is no model archive, or is cut off"):
        _on_kserve(layout)
    (store / "pets.mar").unlink()
    (store / "flowers.mar").unlink()
    with pytest.raises(Refused, match="There is no archive"):
        _on_kserve(layout)
    store.rmdir()
    with pytest.raises(Refused, match="has no folder model-store: KServe's layout"):
        _on_kserve(layout)


def test_sagemaker_serves_an_archive_or_the_content_of_one(tmp_path: Path) -> None:
    folder = tmp_path / "ml" / "model"
    archive = _archive(folder / "pets.mar")
    assert _on_sagemaker(folder).models == ("pets",)
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    serving = _on_sagemaker(folder)
    assert serving.models == ("densenet121",)
    assert serving.archives == (folder,)
    # Without the argument the image does not look there.
    assert platforms.serving_on([], {}, NOWHERE, folder).archives != (folder,)
    (folder / "MAR-INF/MANIFEST.json").unlink()
    _archive(folder / "flowers.mar")
    with pytest.raises(Refused, match=r"holds flowers.mar, pets.mar: .* one archive only"):
        _on_sagemaker(folder)


def test_vertex_ai_chooses_port_addresses_and_folder(tmp_path: Path) -> None:
    _archive(tmp_path / "pets.mar")
    variables = {
        "AIP_HTTP_PORT": "9090",
        "AIP_HEALTH_ROUTE": "/health",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
        "AIP_STORAGE_URI": str(tmp_path),
    }
    serving = _on_vertex(variables)
    assert (serving.port, serving.models) == (9090, ("pets",))
    for variable in ("AIP_HEALTH_ROUTE", "AIP_PREDICT_ROUTE"):
        assert f"location = {variables[variable]} {{" in serving.locations
    # They may be the image's own; a location that is there twice stops nginx.
    serving = _on_vertex({"AIP_HEALTH_ROUTE": "/ping", "AIP_PREDICT_ROUTE": "/v2"})
    assert "location = /ping " not in serving.locations
    assert serving.locations.count("location = /v2 ") == 1


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("AIP_STORAGE_URI", "gs://bucket/model", "this image fetches nothing"),
        ("AIP_STORAGE_URI", "/nowhere", "there is no such folder"),
        ("AIP_HEALTH_ROUTE", "/a { return 200; }", "must be an address"),
        ("AIP_PREDICT_ROUTE", "predict", "must be an address"),
        ("AIP_HTTP_PORT", "80800", "must be a whole number"),
        ("GRPC", "yes", "GRPC must be on or off"),
    ],
)
def test_an_unusable_variable_or_argument_is_rejected(name: str, value: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        _on_vertex({name: value})
    with pytest.raises(Refused, match="takes no argument, and got: train"):
        platforms.serving_on(["train"], {}, NOWHERE, NOWHERE)


def test_the_metadata_are_the_handlers() -> None:
    assert list(kserve._OUTPUTS.items()) == list(open_inference.OUTPUTS.items())
    for multilabel in (False, True):
        wanted = kserve.read_outputs({}, explained=False, multilabel=multilabel)
        told = open_inference.metadata("pets", "1.0", multilabel=multilabel)["outputs"]
        assert [tensor["name"] for tensor in told] == [tensor.name for tensor in wanted]
    assert set(open_inference.INPUTS.values()) <= set(kserve._DATATYPES)


def test_the_messages_are_made_from_the_protocol(tmp_path: Path) -> None:
    proto = Path("deploy/container/open_inference.proto")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", str(proto)],
        check=True,
    )
    made = (tmp_path / proto.with_name("open_inference_pb2.py")).read_text()
    assert made == proto.with_name("open_inference_pb2.py").read_text(), "the .proto says how"


def test_tensors_may_be_in_contents_too() -> None:
    """KServe's and Triton's clients send raw bytes; others of the protocol need not."""
    request = messages.ModelInferRequest(model_name="m", id="7")
    request.parameters["topk"].int64_param = 1
    texts = request.inputs.add(name="images", datatype="BYTES", shape=[2])
    texts.contents.bytes_contents.extend([b"a", b"bc"])
    octets = request.inputs.add(name="more", datatype="UINT8", shape=[2])
    octets.contents.uint_contents.extend([1, 255])
    document, data = to_http(request)
    assert data == [b"\x01\0\0\0a\x02\0\0\0bc", b"\x01\xff"]
    assert document["id"] == "7"
    assert document["parameters"] == {"topk": 1, "binary_data_output": True}
    assert [i["parameters"] for i in document["inputs"]] == [
        {"binary_data_size": 11},
        {"binary_data_size": 2},
    ]


def test_over_grpc_nobody_is_ready_where_nobody_answers() -> None:
    (port,) = unused_ports(1)
    calls = Calls(port)
    assert calls.server_ready(messages.ServerReadyRequest(), 5.0) == messages.ServerReadyResponse()
    with pytest.raises(Failed, match="cannot be asked") as failed:
        calls.model_infer(messages.ModelInferRequest(model_name="m"), 5.0)
    assert failed.value.status == 503


def test_tensors_that_hold_no_images_are_rejected() -> None:
    request = messages.ModelInferRequest(model_name="m")
    request.inputs.add(name="images", datatype="FP32", shape=[1]).contents.fp32_contents.append(1)
    with pytest.raises(Failed, match="must be BYTES or UINT8"):
        to_http(request)
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].contents.uint_contents.append(256)
    with pytest.raises(Failed, match="0 to 255"):
        to_http(request)
    request.raw_input_contents.extend([b"a", b"b"])
    with pytest.raises(Failed, match="1 inputs have 2 raw_input_contents"):
        to_http(request)
