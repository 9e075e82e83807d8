"""What hosting platforms mount and set, and which models, ports and paths follow from it."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.container import routes, serving
from deploy.container.routes import list_routes
from deploy.container.serving import ConfigError, Model, Serving, read_serving
from handler.protocols import kserve_v2
from handler.settings import MODEL_CARD, ModelCard
from scripts.serve.machine import WORKER_BYTES

SNAPSHOT = '{"models": {"cats": {"1.0": {"marName": "pets.mar", "minWorkers": 1}}}}'


def _archive(path: Path, name: str = "densenet121", version: str = "1.0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = {"model": {"modelName": name, "modelVersion": version}}
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return path


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image's own model store; the platforms' folders are in `tmp_path` too."""
    for name in ("MODEL_STORE", "KSERVE", "SAGEMAKER"):
        monkeypatch.setattr(serving, name, tmp_path / name)
    _archive(serving.MODEL_STORE / "densenet121.mar")
    return serving.MODEL_STORE


@pytest.fixture
def layout() -> Path:
    """KServe's, with two archives and a configuration that asks for more than it gets."""
    _archive(serving.KSERVE / "model-store" / "pets.mar", version="2.0")
    _archive(serving.KSERVE / "model-store" / "flowers.mar")
    _configure(serving.KSERVE, "inference_address=http://0.0.0.0:8085", "enable_model_api=true")
    return serving.KSERVE


def _configure(root: Path, *lines: str) -> None:
    (root / "config").mkdir(exist_ok=True)
    (root / "config" / "config.properties").write_text("# comment\n" + "\n".join(lines) + "\n")


def _names(found: Serving) -> tuple[str, ...]:
    return tuple(model.name for model in found.models)


def test_the_container_images_own_archive_is_served_by_default(own: Path) -> None:
    serving.SAGEMAKER.mkdir()
    for found in (read_serving(["serve"], {}), read_serving([], {"AIP_STORAGE_URI": ""})):
        assert [model.archive for model in found.models] == [own / "densenet121.mar"]
        assert (_names(found), found.port, found.workers) == (("densenet121",), 8080, None)
    _archive(own / "a.mar")
    assert _names(read_serving([], {"WORKERS": "3", "PORT": ""})) == ("a", "densenet121")


def test_a_mounted_kserve_configuration_chooses_models_and_nothing_else(
    layout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_serving([], {})
    assert _names(found) == ("flowers", "pets")
    assert {model.archive.parent for model in found.models} == {layout / "model-store"}
    assert "ignored: inference_address, enable_model_api" in capsys.readouterr().out
    shutil.rmtree(layout / "config")
    assert _names(read_serving([], {})) == ("flowers", "pets")


def test_kserves_configuration_chooses_and_names_models(layout: Path) -> None:
    for line, models in (
        ("load_models=all", ("flowers", "pets")),
        ("load_models=pets.mar", ("pets",)),
        ("load_models=cats=pets.mar, flowers.mar", ("cats", "flowers")),
        (f"model_snapshot={SNAPSHOT}", ("cats",)),
    ):
        _configure(layout, line)
        assert _names(read_serving([], {})) == models


def test_a_broken_configuration_or_layout_is_rejected(layout: Path) -> None:
    for line, message in (
        ("load_models=dogs.mar", "holds no dogs.mar"),
        ("load_models=http://elsewhere/pets.mar", "cannot be the name"),
        ("load_models=../own/densenet121.mar", "cannot be the name"),
        ('load_models=a"b;=pets.mar', "cannot be the name"),
        ("model_snapshot={", "model_snapshot must be JSON"),
        ('model_snapshot={"models": {}}', "names no model"),
        ('model_snapshot={"models": {"cats": {"1.0": {"marName": 7}}}}', "cannot be the name"),
    ):
        _configure(layout, line)
        with pytest.raises(ConfigError, match=message):
            read_serving([], {})
    _configure(layout)
    store = layout / "model-store"
    (store / "pets.mar").write_bytes(b"half an archive")
    with pytest.raises(ConfigError, match=r"pets\.mar is no model archive, or is cut off"):
        read_serving([], {})
    for archive in store.iterdir():
        archive.unlink()
    with pytest.raises(ConfigError, match="There is no archive"):
        read_serving([], {})
    store.rmdir()
    with pytest.raises(ConfigError, match="has no folder model-store: KServe's layout"):
        read_serving([], {})


def test_sagemaker_serves_an_archive_or_the_content_of_one() -> None:
    folder = serving.SAGEMAKER
    archive = _archive(folder / "pets.mar")
    assert _names(read_serving(["serve"], {})) == ("pets",)
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    (model,) = read_serving(["serve"], {}).models
    assert (model.name, model.archive) == ("densenet121", folder)
    # Without the argument the image does not look there.
    (model,) = read_serving([], {}).models
    assert model.archive != folder
    (folder / "MAR-INF/MANIFEST.json").unlink()
    _archive(folder / "flowers.mar")
    with pytest.raises(ConfigError, match=r"holds flowers.mar, pets.mar: .* one archive only"):
        read_serving(["serve"], {})


@pytest.mark.parametrize("unpacked", [False, True])
def test_workers_memory_and_labels_follow_the_archives_model_card(
    tmp_path: Path, *, unpacked: bool
) -> None:
    base = ModelCard("pets", 3, True, "a test", "0", "0")
    card = replace(base, precision="int8", activation="sigmoid", thresholds=(0.5, 0.5, 0.5))
    archive = _archive(tmp_path / "packed/pets.mar")
    with zipfile.ZipFile(archive, "a") as content:
        content.writestr(MODEL_CARD, card.to_json())
        content.extractall(tmp_path / "unpacked")
    folder = tmp_path / ("unpacked" if unpacked else "packed")
    (model,) = read_serving([], {"AIP_STORAGE_URI": str(folder)}).models
    assert model.multilabel
    assert model.worker_bytes > WORKER_BYTES
    assert "labels" in [tensor["name"] for tensor in routes.metadata(model)["outputs"]]


def test_vertex_ai_chooses_port_and_folder(tmp_path: Path) -> None:
    _archive(tmp_path / "pets.mar")
    variables = {"AIP_HTTP_PORT": "9090", "PORT": "80", "AIP_STORAGE_URI": f"file://{tmp_path}"}
    found = read_serving([], variables)
    assert (found.port, _names(found)) == (9090, ("pets",))


def test_an_unusable_variable_or_argument_is_rejected() -> None:
    for name, value, message in (
        ("AIP_STORAGE_URI", "gs://bucket/model", "this image downloads nothing"),
        ("AIP_STORAGE_URI", "/nowhere", "/nowhere is no folder"),
        ("AIP_HTTP_PORT", "80800", "AIP_HTTP_PORT must be a whole number"),
        ("AIP_HTTP_PORT", "8085", "AIP_HTTP_PORT must not be 8085"),
        ("PORT", "9000", r"PORT must not be 9000: .* the ports 8081, 8082, 8085, 9000\."),
        ("GRPC_PORT", "8082", "GRPC_PORT must not be 8082"),
        ("WORKERS", "0", "WORKERS must be a whole number from 1 to 1024, got '0'"),
        ("GRPC", "yes", "GRPC must be on or off"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_serving([], {"GRPC": "on", name: value})
    with pytest.raises(ConfigError, match="takes no argument, and got: train"):
        read_serving(["train"], {})


def test_kubernetes_service_links_are_no_ports() -> None:
    """They are set for Services with the name `grpc`, or none at all."""
    links = dict.fromkeys(("GRPC_PORT", "MANAGEMENT_PORT", "PORT"), "tcp://10.0.0.1:9000")
    found = read_serving([], {"GRPC": "on", **links})
    assert (found.port, found.grpc_port) == (8080, 9000)
    off = {"GRPC": "off", "PORT": "9000", "GRPC_PORT": "8082"}
    assert read_serving([], off).grpc_port is None


# --- Paths ---

CATS = Model("cats", "2.0", Path("cats.mar"))


def test_two_versions_of_a_model_have_each_path_once() -> None:
    """With a path twice, nginx would not start."""
    old = Model("cats", "1.0", Path("old.mar"))
    paths = [route.path for route in list_routes([old, CATS], {})]
    assert len(set(paths)) == len(paths)
    assert {"/predictions/cats/1.0", "/predictions/cats/2.0", "/v1/models/cats"} <= set(paths)


def test_vertex_ai_chooses_paths() -> None:
    predict = "/v1/endpoints/1/deployedModels/2:predict"
    variables = {"AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": predict}
    added = {route.path: route for route in list_routes([CATS], variables)}
    assert added["/health"].needs_ready
    assert (added[predict].target, added[predict].methods) == ("/predictions/cats", ("POST", "PUT"))
    for health, predict in (("/ping", "/predictions/cats"), ("/v2/health/ready", ""), ("", "")):
        variables = {"AIP_HEALTH_ROUTE": health, "AIP_PREDICT_ROUTE": predict}
        assert list_routes([CATS], variables) == list_routes([CATS], {})


def test_vertex_ai_cannot_choose_a_path_that_is_invalid_or_has_another_use() -> None:
    for path in ("/ping", "/live", "/error", "/v2", "/health"):
        variables = {"AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": path}
        with pytest.raises(ConfigError, match=f"AIP_PREDICT_ROUTE is {path}, which has another"):
            list_routes([CATS], variables)
    with pytest.raises(ConfigError, match="AIP_HEALTH_ROUTE is /invocations"):
        list_routes([CATS], {"AIP_HEALTH_ROUTE": "/invocations"})
    for name in ("AIP_HEALTH_ROUTE", "AIP_PREDICT_ROUTE"):
        for path in ("/a { return 200; }", "predict"):
            with pytest.raises(ConfigError, match=f"{name} must be a path"):
                list_routes([CATS], {name: path})


def test_the_metadata_equal_the_handlers() -> None:
    assert list(kserve_v2._OUTPUTS.items()) == list(routes.OUTPUTS.items())
    for multilabel in (False, True):
        wanted = kserve_v2.parse_outputs({}, explained=False, multilabel=multilabel)
        model = Model("cats", "2.0", Path("cats.mar"), multilabel=multilabel)
        outputs = routes.metadata(model)["outputs"]
        assert [tensor["name"] for tensor in outputs] == [tensor.name for tensor in wanted]
    assert set(routes.INPUTS.values()) <= set(kserve_v2._DATATYPES)
