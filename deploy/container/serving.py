"""Read the container's configuration from the command line, the environment and mounted folders.

    KServe     /mnt/models      config/config.properties and model-store/NAME.mar
    SageMaker  /opt/ml/model    NAME.mar or its unpacked files; the command line is `serve`
    Vertex AI  AIP_STORAGE_URI  the same, if it is a folder; AIP_HTTP_PORT, AIP_HEALTH_ROUTE and
                                AIP_PREDICT_ROUTE override port and paths

By default the model archives in the container image are served. A mounted config.properties selects
and names models; its other keys are ignored.
"""

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.serve.machine import WORKER_BYTES, worker_bytes
from scripts.store import read_card

ROOT = Path(__file__).resolve().parents[2]
MODEL_STORE = ROOT / "model_store"
KSERVE = Path("/mnt/models")
SAGEMAKER = Path("/opt/ml/model")

# Ports on loopback, except the metrics port, which is on all addresses.
MANAGEMENT_PORT, METRICS_PORT, TORCHSERVE_PORT = OWN_PORTS = (8081, 8082, 8085)
_GRPC_PORT = 9000
_MAX_PORT = 65535
_MAX_WORKERS = 1024
# Kubernetes sets NAME_PORT=tcp://... for each Service, for instance one named `grpc`.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
# Supported keys of a mounted config.properties. `model_store` is always the mounted model-store.
_USED_KEYS = ("load_models", "model_snapshot", "model_store")
_MANIFEST = "MAR-INF/MANIFEST.json"
# Names that need no quoting in paths, in TorchServe's lists and in nginx.conf.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,126}")


class ConfigError(Exception):
    """The configuration is unusable; the message is for the person who started the container."""


@dataclass(frozen=True)
class Model:
    """One model to serve.

    Attributes:
        name: the model's name in paths.
        version: the archive's version.
        archive: a `.mar` file, or a folder with its unpacked files.
        multilabel: whether the model is multi-label.
        worker_bytes: maximum memory of one of its workers.
    """

    name: str
    version: str
    archive: Path
    multilabel: bool = False
    worker_bytes: int = WORKER_BYTES


@dataclass(frozen=True)
class Serving:
    """The container's configuration.

    Attributes:
        models: one or more, with archives in one folder; the first is the default.
        port: nginx's port, on all addresses.
        grpc_port: the port of KServe's gRPC, on all addresses; None if it is off.
        workers: workers per model; None to derive them from the container's limits.
    """

    models: tuple[Model, ...]
    port: int = 8080
    grpc_port: int | None = None
    workers: int | None = None


def read_serving(arguments: Sequence[str], environment: Mapping[str, str]) -> Serving:
    """Return the configuration from the container's command, its variables and mounted folders.

    Raises:
        ConfigError: an argument, a variable or a mounted file is invalid, or there is no archive.
    """
    on_sagemaker = list(arguments) == ["serve"]
    if arguments and not on_sagemaker:
        raise ConfigError(f"The image takes no argument, and got: {' '.join(arguments)}.")
    port, grpc_port = _ports(environment)
    workers = _number(environment, "WORKERS", _MAX_WORKERS)
    try:
        if KSERVE.exists():
            models = _kserve_models()
        elif uri := environment.get("AIP_STORAGE_URI"):
            models = [_single_model(Path(uri.removeprefix("file://")))]
        # SageMaker creates an empty folder for a model without data.
        elif on_sagemaker and SAGEMAKER.is_dir() and any(SAGEMAKER.iterdir()):
            models = [_single_model(SAGEMAKER)]
        else:
            models = [_model(path) for path in _archives(MODEL_STORE)]
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return Serving(tuple(models), port, grpc_port, workers)


def read_properties(path: Path) -> dict[str, str]:
    """Parse `key=value` lines, the part of Java's format that TorchServe's configurations use."""
    text = path.read_text("utf-8", errors="replace").replace("\\\n", "")
    return dict(re.findall(r"^[ \t]*([^#!=\s]+)[ \t]*=[ \t]*(.*?)[ \t]*$", text, re.MULTILINE))


# --- Variables ---


def _ports(environment: Mapping[str, str]) -> tuple[int, int | None]:
    """Return nginx's port, and the gRPC port if gRPC is on."""
    grpc = environment.get("GRPC", "off")
    if grpc not in {"on", "off"}:
        raise ConfigError(f"GRPC must be on or off, got {grpc[:100]!r}.")
    name = "AIP_HTTP_PORT" if "AIP_HTTP_PORT" in environment else "PORT"
    port = _number(environment, name, _MAX_PORT) or Serving.port
    ports = {name: port}
    if grpc == "on":
        ports = {"GRPC_PORT": _number(environment, "GRPC_PORT", _MAX_PORT) or _GRPC_PORT, **ports}
    taken = [*OWN_PORTS]
    for variable, number in ports.items():
        if number in taken:
            raise ConfigError(
                f"{variable} must not be {number}: the container itself uses the ports "
                f"{', '.join(map(str, taken))}."
            )
        taken.append(number)
    return port, ports.get("GRPC_PORT")


def _number(environment: Mapping[str, str], name: str, maximum: int) -> int | None:
    text = environment.get(name, "")
    if not text or _SERVICE_LINK.match(text):
        return None
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= maximum:
        raise ConfigError(f"{name} must be a whole number from 1 to {maximum}, got {text!r}.")
    return int(text)


# --- Mounted folders ---


def _kserve_models() -> list[Model]:
    store, config = KSERVE / "model-store", KSERVE / "config" / "config.properties"
    if not store.is_dir():
        raise ConfigError(
            f"{KSERVE} has no folder model-store: KServe's layout for TorchServe is "
            "config/config.properties and model-store/NAME.mar."
        )
    properties = read_properties(config) if config.exists() else {}
    if ignored := [key for key in properties if key not in _USED_KEYS]:
        print(f"==> {config} only chooses models; ignored: {', '.join(ignored)}.")
    chosen: list[tuple[str | None, object]]
    if snapshot := properties.get("model_snapshot"):
        try:
            models = json.loads(snapshot)["models"].items()
            chosen = [(name, one["marName"]) for name, all_ in models for one in all_.values()]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f'{config}: model_snapshot must be JSON such as {{"models": {{"pets": {{"1.0": '
                '{"marName": "pets.mar"}}}}.'
            ) from error
        if not chosen:
            raise ConfigError(f"{config}: model_snapshot names no model.")
    elif (wanted := properties.get("load_models", "all")).lower() in {"", "all", "none"}:
        return [_model(path) for path in _archives(store)]
    else:
        entries = (entry.strip().rpartition("=") for entry in wanted.split(","))
        chosen = [(name or None, mar) for name, _, mar in entries]
    return [_model(store / _valid_name(mar), name) for name, mar in chosen]


def _single_model(folder: Path) -> Model:
    """Return the model of a folder with one archive, packed or unpacked."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder, and this image downloads nothing. Build the archive into the "
            "image, and leave AIP_STORAGE_URI empty (no --artifact-uri)."
        )
    if (folder / _MANIFEST).is_file():
        return _model(folder)
    archives = _archives(folder)
    if len(archives) > 1:
        raise ConfigError(
            f"{folder} holds {', '.join(path.name for path in archives)}: requests on this "
            "platform name no model, so there can be one archive only."
        )
    return _model(archives[0])


def _archives(folder: Path) -> list[Path]:
    if archives := sorted(folder.glob("*.mar")):
        return archives
    raise ConfigError(f"There is no archive (*.mar) in {folder}.")


# --- Archives ---


def _model(archive: Path, name: str | None = None) -> Model:
    """Return an archive's model; its default name is the file's, or the manifest's in a folder."""
    try:
        if archive.is_dir():
            text = (archive / _MANIFEST).read_bytes()
        else:
            with zipfile.ZipFile(archive) as content:
                text = content.read(_MANIFEST)
        manifest = json.loads(text)["model"]
        own_name = manifest["modelName"]
    except FileNotFoundError as error:
        raise ConfigError(f"{archive.parent} holds no {archive.name}.") from error
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{archive} is no model archive, or is cut off.") from error
    if name is None:
        name = own_name if archive.is_dir() else archive.stem
    card = read_card(archive)
    return Model(
        name=_valid_name(name),
        version=_valid_name(manifest.get("modelVersion", "1.0")),
        archive=archive,
        multilabel=card is not None and card.multilabel,
        worker_bytes=WORKER_BYTES if card is None else worker_bytes(card.precision),
    )


def _valid_name(name: object) -> str:
    """Return a valid name; reject paths, and URLs, from which TorchServe would download."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{str(name)[:100]!r} cannot be the name of a model, a version or an archive: letters, "
            "digits, dots, hyphens and underscores can."
        )
    return name
