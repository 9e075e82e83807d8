"""The model file: the description of a model archive in YAML (`MODEL_FILE=pets.yaml`).

Its keys are typed. An error names the file, the line, the key and what is allowed. Relative paths
are relative to the file. `python -m scripts.build.model_file` prints its JSON schema.
"""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from scripts.build.guard import Limits
from scripts.build.messages import read_bytes
from scripts.build.preprocessing import PreprocessingOptions
from scripts.store import DEFAULT_ARCHITECTURE, PACKAGED_ARCHITECTURE
from scripts.terminal import UserError

TIMM = "timm/"
RANDOM = "random"

# A model's name is part of URLs and of file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_BYTES = 1_000_000


def _file(path: str | Path, info: ValidationInfo) -> Path:
    found = Path((info.context or {}).get("folder", ""), Path(path).expanduser())
    if not found.exists():
        raise ValueError(f"there is no {found}")
    return found


def _folder(path: Path, info: ValidationInfo) -> Path:
    found = _file(path, info)
    if not found.is_dir():
        raise ValueError(f"{found} must be a folder of images")
    return found


File = Annotated[Path, AfterValidator(_file)]
Folder = Annotated[Path, AfterValidator(_folder)]


def _weights(value: object, info: ValidationInfo) -> str | None:
    """Return an address, "random", or the absolute or relative path of a file that is there."""
    if value is None or value == RANDOM or re.match("https?://", str(value)):
        return value if value is None else str(value)
    if not isinstance(value, (str, Path)):
        raise ValueError(f"must be a file, an address or random, got {value!r}")
    return str(_file(value, info))


def _classes(value: object, info: ValidationInfo) -> Any:
    """Return a list of classes as it is written, or the path of a file of them."""
    return _file(value, info) if isinstance(value, (str, Path)) else value


def _thresholds(value: object, info: ValidationInfo) -> Any:
    if isinstance(value, (str, Path)):
        return _file(value, info)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value <= 1:
            raise ValueError(f"must be from 0 to 1, got {value}")
        return float(value)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("must be a number, a mapping of class to number, or a file")
    return value


class Precision(BaseModel):
    """The type that the model computes in, and limits of its cost, as in `Limits`.

    Attributes:
        calibration: folder of images that int8 is calibrated on.
        evaluation: folder of images that the cost is measured on; for int8 the default is a part
            of `calibration`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["float32", "bf16", "int8"] = "float32"
    calibration: Folder | None = None
    evaluation: Folder | None = None
    max_loss: Annotated[float, Field(ge=0, le=100)] = Limits.max_loss
    agreement: Annotated[float, Field(ge=0, le=1)] = Limits.agreement

    @property
    def limits(self) -> Limits:
        """Return the limits of the cost."""
        return Limits(self.max_loss, self.agreement)

    @model_validator(mode="after")
    def _complete(self) -> "Precision":
        if self.type == "float32" and (self.calibration or self.evaluation):
            raise ValueError("calibration and evaluation are for bf16 and int8")
        if self.type == "int8" and self.calibration is None:
            raise ValueError(
                "int8 is calibrated on a few hundred images like those that the model will get: "
                "calibration: folder (on the command line IMAGES=folder)"
            )
        if self.type == "bf16" and self.calibration is not None:
            raise ValueError("bf16 needs no calibration: leave it out")
        if self.type == "bf16" and self.evaluation is None:
            raise ValueError(
                "what bf16 costs is measured on images like those that the model will get: "
                "evaluation: folder (on the command line IMAGES=folder)"
            )
        return self


def _by_name(key: str) -> BeforeValidator:
    """Accept the value of one key in place of a mapping, such as `precision: float32`."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value,
        json_schema_input_type=str | dict[str, Any],
    )


class ModelFile(BaseModel):
    """The description of a model archive; docs/reference/model-file.md has the meaning of each key.

    `classes` and `thresholds` are a path, or the content itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, title="Model file")

    name: str = ""
    model: File | None = None
    arch: str | None = None
    weights: Annotated[str | None, BeforeValidator(_weights)] = None
    weights_key: str | None = None
    revision: str | None = None
    classes: Annotated[Any, BeforeValidator(_classes, json_schema_input_type=str | list[str])] = (
        None
    )
    preprocessing: Annotated[PreprocessingOptions, _by_name("preset")] = PreprocessingOptions()
    activation: Literal["softmax", "sigmoid"] = "softmax"
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    thresholds: Annotated[
        Any,
        BeforeValidator(_thresholds, json_schema_input_type=float | str | dict[str, float]),
    ] = None
    engine: Literal["onnx", "torch"] = "onnx"
    precision: Annotated[Precision, _by_name("type")] = Precision()
    allow_saturated: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("name"):
            return values
        origin = values.get("arch") or (values.get("model") and Path(str(values["model"])).stem)
        name = str(origin or "").removeprefix(TIMM).replace(".", "-")
        return {**values, "name": name}

    @model_validator(mode="after")
    def _consistent(self) -> "ModelFile":
        whole = self.model is not None and not self.is_python
        if bool(self.arch) == bool(self.model):
            raise ValueError("set one of model and arch")
        if NAME.fullmatch(self.name) is None:
            raise ValueError(
                f"name {self.name!r} must be 1 to 64 letters, digits, - and _, not - or _ first"
            )
        if self.is_python and not self.weights:
            raise ValueError("a Python file needs weights: the file of its state dict")
        if whole and self.weights is not None:
            raise ValueError("model is a whole model: leave weights out")
        if self.weights_key is not None and self.weights is None:
            raise ValueError("weights_key is for weights: it chooses one state dict of the file")
        if self.engine == "torch" and not self.is_torchvision:
            raise ValueError("engine: torch is for torchvision's architectures; leave it out")
        if self.engine == "torch" and self.precision.type != "float32":
            raise ValueError(
                f"precision {self.precision.type} is OpenVINO's: leave engine: torch out"
            )
        if self.revision is not None and (not self.is_timm or self.weights is not None):
            raise ValueError("revision is for arch: timm/NAME without weights")
        wrong = "threshold" if self.multilabel else "thresholds"
        if getattr(self, wrong) is not None:
            raise ValueError(
                f"{wrong} does not fit activation: {self.activation} (softmax has "
                "threshold, sigmoid has thresholds)"
            )
        return self

    @property
    def is_python(self) -> bool:
        """Return whether the model is the user's own Python code."""
        return self.model is not None and self.model.suffix == ".py"

    @property
    def is_timm(self) -> bool:
        """Return whether timm makes the architecture."""
        return (self.arch or "").startswith(TIMM)

    @property
    def is_torchvision(self) -> bool:
        """Return whether torchvision makes the architecture."""
        return bool(self.arch) and not self.is_timm and self.arch != PACKAGED_ARCHITECTURE

    @property
    def has_graph(self) -> bool:
        """Return whether the archive is made of a graph in the repository, without PyTorch."""
        return self.engine == "onnx" and self.arch in {DEFAULT_ARCHITECTURE, PACKAGED_ARCHITECTURE}

    @property
    def multilabel(self) -> bool:
        """Return whether an image can have several labels, or none."""
        return self.activation == "sigmoid"

    def replace(self, **values: Any) -> "ModelFile":
        """Return the same with other values."""
        return ModelFile(**{**dict(self), **values})

    def to_yaml(self) -> str:
        """Return the text of an equal file, without default values."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        return yaml.safe_dump(
            {"name": self.name, **values},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
        )


def read(path: Path, overrides: Mapping[str, Any] | None = None) -> ModelFile:
    """Read and validate a model file; raise `UserError` with the line, the key and what is allowed.

    `overrides`, from the command line, replace the file's values by key. Their paths are relative
    to the current folder, and `preprocessing` replaces single keys.
    """
    data = read_bytes(path, "model file", MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        tree = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError too
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"The model file {path} is not valid YAML: {problem}.") from error
    if not isinstance(content, dict) or not isinstance(tree, yaml.MappingNode):
        raise UserError(f"The model file {path} must hold keys and values, such as: arch: resnet50")
    _check_repeated(tree, path)
    try:
        spec = ModelFile.model_validate(content, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise UserError(_message(error, path, tree)) from error
    if not overrides:
        return spec
    values = {**dict(spec), **overrides}
    if "preprocessing" in overrides:
        given = spec.preprocessing.model_dump(exclude_none=True)
        values["preprocessing"] = {**given, **overrides["preprocessing"]}
    return from_options(**values)


def from_options(**options: Any) -> ModelFile:
    """Return the model file for values by key, of which None stands for the default."""
    try:
        return ModelFile.model_validate({k: v for k, v in options.items() if v is not None})
    except ValidationError as error:
        raise UserError(_message(error)) from error


def _message(error: ValidationError, path: Path | None = None, tree: Any = None) -> str:
    """Return the first few errors, one sentence each."""
    sentences = []
    for one in error.errors()[:3]:
        keys = [str(key) for key in one["loc"]]
        # An error of several keys begins with the name of one.
        named = keys or one["msg"].removeprefix("Value error, ").split()[:1]
        where = f"{path}, line {_line(tree, named)}: " if path else ""
        sentences.append(where + _sentence(one, keys))
    return " ".join(dict.fromkeys(sentences))


def _sentence(one: Mapping[str, Any], keys: list[str]) -> str:
    if one["type"] == "extra_forbidden":
        owner: type[BaseModel] = ModelFile
        if len(keys) > 1:
            owner = Precision if keys[0] == "precision" else PreprocessingOptions
        fields = list(owner.model_fields)
        near = get_close_matches(keys[-1], fields, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{keys[-1]!r} is no key here.{hint} Allowed are: {', '.join(fields)}."
    message = str(one["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    got = f", got {one['input']!r:.60}" if message.startswith("must be") else ""
    begin = f"{': '.join(keys)}: " if keys else ""
    return f"{begin}{message}{'' if 'got ' in message else got}."


def _line(node: Any, keys: list[str]) -> int:
    """Return the line of the innermost of nested keys that the file has, from 1 on."""
    line = int(node.start_mark.line) + 1
    for key in keys:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if name.value == key:
                line, node = int(name.start_mark.line) + 1, value
                break
    return line


def _check_repeated(node: yaml.MappingNode, path: Path) -> None:
    seen = set()
    for name, value in node.value:
        if name.value in seen:
            raise UserError(f"{path}, line {name.start_mark.line + 1}: {name.value} occurs twice.")
        seen.add(name.value)
        if isinstance(value, yaml.MappingNode):
            _check_repeated(value, path)


if __name__ == "__main__":
    print(json.dumps(ModelFile.model_json_schema(), indent=2))
