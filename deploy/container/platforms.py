"""What hosting platforms bring: their own models, and the port and addresses they ask on.

    KServe     /mnt/models      config/config.properties and model-store/NAME.mar
    SageMaker  /opt/ml/model    NAME.mar, or the content of one; the image is run as `serve`
    Vertex AI  AIP_STORAGE_URI  the same, where it is a folder; AIP_HTTP_PORT, AIP_HEALTH_ROUTE and
                                AIP_PREDICT_ROUTE say where the service is asked

Where nothing is mounted the image's own archives serve. Of a mounted config.properties only the
choice of models counts: a model store brings models, and what bounds the server stays the image's.
"""

import dataclasses
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.container.open_inference import addresses, locations, passed_on, readiness
from deploy.container.serving import Refused, Serving, archives_in, chosen
from scripts.store import read_card

KSERVE = Path("/mnt/models")
SAGEMAKER = Path("/opt/ml/model")
SERVE = "serve"

# Of a mounted config.properties. `model_store` can only be the folder beside it.
_TAKEN = ("load_models", "model_snapshot", "model_store")
_MOST_CONFIG_BYTES = 1_000_000
_MANIFEST = "MAR-INF/MANIFEST.json"
_MOST_MANIFEST_BYTES = 100_000
# What is one word in an address, in TorchServe's lists and in nginx's configuration.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,126}")
_ADDRESS = re.compile(r"/[A-Za-z0-9_.~:@/-]{0,500}")
# Of nginx.conf itself, whatever is mounted.
_OWN = ("/ping", "/live", "/error")
_LAYOUT = "KServe's layout for TorchServe is config/config.properties and model-store/NAME.mar"


@dataclass(frozen=True)
class Model:
    """One model to serve.

    Attributes:
        name: under which it is asked.
        version: as its archive says.
        archive: a `.mar`, or a folder with the content of one.
        multilabel: whether it gives several labels a picture.
    """

    name: str
    version: str
    archive: Path
    multilabel: bool = False


def serving_on(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    kserve: Path = KSERVE,
    sagemaker: Path = SAGEMAKER,
) -> Serving:
    """What the container serves on the platform that it finds itself on.

    Args:
        arguments: what stands behind the image's name on the command line.
        environment: the container's.
        kserve: where KServe mounts what `storageUri` says.
        sagemaker: where SageMaker unpacks `model.tar.gz`.

    Raises:
        Refused: something is mounted or said that cannot be served.
    """
    vertex = {name: value for name, value in environment.items() if name.startswith("AIP_")}
    as_sagemaker = list(arguments) == [SERVE]
    if "AIP_HTTP_PORT" in vertex:
        environment = {**environment, "PORT": vertex["AIP_HTTP_PORT"]}
    own = chosen([] if as_sagemaker else arguments, environment)
    try:
        models = _mounted(vertex, kserve, sagemaker if as_sagemaker else None)
        if models is None:
            models = [_model(path) for path in own.archives]
    except OSError as error:
        raise Refused(f"{error.filename} cannot be read: {error.strerror}.") from error
    return dataclasses.replace(
        own,
        archives=tuple(model.archive for model in models),
        names=tuple(model.name for model in models),
        locations=own.locations
        + locations(
            {
                **addresses(
                    {model.name: model.version for model in models},
                    {model.name for model in models if model.multilabel},
                ),
                **_of_vertex(vertex, models[0].name),
            }
        ),
    )


def _mounted(vertex: Mapping[str, str], kserve: Path, sagemaker: Path | None) -> list[Model] | None:
    if kserve.exists():
        return _kserve(kserve)
    if uri := vertex.get("AIP_STORAGE_URI"):
        return [_single(_folder(uri))]
    # SageMaker makes the folder for a model without data, too.
    if sagemaker is not None and sagemaker.is_dir() and any(sagemaker.iterdir()):
        return [_single(sagemaker)]
    return None


# --- KServe ---


def _kserve(root: Path) -> list[Model]:
    store = root / "model-store"
    if not store.is_dir():
        raise Refused(f"{root} has no folder model-store: {_LAYOUT}.")
    config = root / "config" / "config.properties"
    properties = _properties(config) if config.exists() else {}
    if left_out := [key for key in properties if key not in _TAKEN]:
        print(f"==> Of {config} only the choice of models counts, not {', '.join(left_out)}.")
    if snapshot := properties.get("model_snapshot"):
        return [_model(store / _word(mar), name) for name, mar in _of_snapshot(config, snapshot)]
    wanted = properties.get("load_models", "all")
    if wanted.lower() in {"", "all", "none"}:
        return [_model(path) for path in archives_in(store)]
    entries = (entry.strip().rpartition("=") for entry in wanted.split(","))
    return [_model(store / _word(mar), name or None) for name, _, mar in entries]


def _properties(path: Path) -> dict[str, str]:
    """Java's properties, as far as TorchServe's configurations use them: `key=value` lines."""
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise Refused(f"{path} has more than {_MOST_CONFIG_BYTES:,} bytes.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not text.") from error
    lines = (line.strip() for line in text.replace("\\\n", "").splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#!")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _of_snapshot(config: Path, snapshot: str) -> list[tuple[str, object]]:
    """Names and archives of the models of a snapshot of TorchServe's."""
    try:
        models = json.loads(snapshot)["models"]
        found = [(name, of["marName"]) for name, all_ in models.items() for of in all_.values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Refused(
            f'{config}: model_snapshot must be JSON such as {{"models": {{"pets": {{"1.0": '
            '{"marName": "pets.mar"}}}}.'
        ) from error
    if not found:
        raise Refused(f"{config}: model_snapshot names no model.")
    return found


# --- One model in a folder ---


def _folder(uri: str) -> Path:
    folder = Path(uri.removeprefix("file://"))
    if "://" in str(folder) or uri.startswith("gs:"):
        raise Refused(
            f"AIP_STORAGE_URI is {uri}, and this image fetches nothing. Build the archive into "
            "the image, and upload the model without --artifact-uri."
        )
    if not folder.is_dir():
        raise Refused(f"AIP_STORAGE_URI is {uri}, and there is no such folder.")
    return folder


def _single(folder: Path) -> Model:
    """A folder that holds one archive, or what was one."""
    if (folder / _MANIFEST).is_file():
        return _model(folder)
    archives = archives_in(folder)
    if len(archives) > 1:
        raise Refused(
            f"{folder} holds {', '.join(path.name for path in archives)}: requests on this "
            "platform name no model, so there can be one archive only."
        )
    return _model(archives[0])


# --- Archives ---


def _model(archive: Path, name: str | None = None) -> Model:
    """An archive that TorchServe can be told of; without a name it is called as its file."""
    manifest = _manifest(archive)
    if name is None:
        name = str(manifest["modelName"]) if archive.is_dir() else archive.stem
    card = read_card(archive)
    return Model(
        name=_word(name),
        version=_word(manifest.get("modelVersion", "1.0")),
        archive=archive,
        multilabel=card is not None and card.multilabel,
    )


def _manifest(archive: Path) -> dict[str, object]:
    try:
        if archive.is_dir():
            text = (archive / _MANIFEST).read_bytes()[:_MOST_MANIFEST_BYTES]
        else:
            with zipfile.ZipFile(archive) as content, content.open(_MANIFEST) as file:
                text = file.read(_MOST_MANIFEST_BYTES)
        manifest: dict[str, object] = json.loads(text)["model"]
        _ = manifest["modelName"]
    except FileNotFoundError as error:
        raise Refused(f"{archive.parent} holds no {archive.name}.") from error
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError) as error:
        raise Refused(f"{archive} is no model archive, or is cut off.") from error
    return manifest


def _word(name: object) -> str:
    """A plain name: no address, from which TorchServe would fetch, and no path."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refused(
            f"{str(name)[:100]!r} cannot be the name of a model, a version or an archive: letters, "
            "digits, dots, hyphens and underscores can."
        )
    return name


# --- Vertex AI ---


def _of_vertex(variables: Mapping[str, str], model: str) -> dict[str, str]:
    """Vertex AI's addresses, and what nginx does there."""
    found = {}
    health = _address(variables, "AIP_HEALTH_ROUTE")
    if health and health not in _OWN:
        found[health] = readiness()
    if predict := _address(variables, "AIP_PREDICT_ROUTE"):
        # Of TorchServe's addresses the one on which a query reaches the handler.
        found[predict] = passed_on(f"/{model}/predict")
    return found


def _address(variables: Mapping[str, str], name: str) -> str:
    address = variables.get(name, "")
    if address and not _ADDRESS.fullmatch(address):
        raise Refused(f"{name} must be an address such as /health, got {address[:200]!r}.")
    return address
