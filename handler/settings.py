"""The operator's settings and the builder's model card, checked when the worker starts.

`Settings` is the section `handler` of `model-config.yaml`, `ModelCard` is `model-card.json`. With a
misspelled key or a value out of range, the worker exits with a message that names it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from handler.errors import ArchiveError

MODEL_CARD = "model-card.json"

PRECISIONS = ("float32", "bf16", "int8")

_MAX_FLOAT32 = 3.4e38

# Accepted types per field type: YAML parses `threshold: 1` as an int.
_ACCEPTED_TYPES: dict[type, tuple[type, ...]] = {float: (float, int), tuple: (list, tuple)}

# TorchServe's configuration, next to this package in the project and in the container image.
_CONFIG = Path(__file__).parents[1] / "config.properties"


def _max_request_bytes() -> int:
    """Return `max_request_size` of TorchServe's configuration, in bytes.

    TorchServe does not pass it to its workers; the commands and the container do, in the variable
    `MAX_REQUEST_BYTES`.
    """
    text = _CONFIG.read_text("utf-8") if _CONFIG.is_file() else ""
    found = re.findall(r"^max_request_size=([0-9]+)\s*$", text, re.MULTILINE)
    return int(os.environ.get("MAX_REQUEST_BYTES") or (found[-1] if found else 20 * 1024 * 1024))


# 20 MB by default.
MAX_REQUEST_BYTES = _max_request_bytes()

# Maximum memory of all decoding in a worker and its decoder process at any time, in bytes. An image
# that needs more is rejected; one that needs more than is left waits. A WebP of 12 megapixels needs
# 196 MB, a HEIC of 24 175 MB, a PNG of 50 200 MB.
DECODING_BYTES = 210_000_000

# The decoder process itself: Python, NumPy and Pillow.
_DECODER_BYTES = 42_000_000
# The bodies of one batch: `batchSize` (model-config.yaml) of them.
_BODIES_BYTES = 8 * MAX_REQUEST_BYTES

# The most memory that requests of any kind add to a worker: 420 MB.
ADDED_BYTES = DECODING_BYTES + _DECODER_BYTES + _BODIES_BYTES

_T = TypeVar("_T", bound="_Checked")


def _bounded(default: float, low: float, high: float) -> Any:
    return field(default=default, metadata={"bounds": (low, high)})


def _one_of(*allowed: str) -> Any:
    """Return a field with these allowed values, of which the first is the default."""
    return field(default=allowed[0], metadata={"allowed": allowed})


class _Checked:
    """A dataclass whose values are checked."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if "bounds" in f.metadata:
                low, high = f.metadata["bounds"]
                if not low <= value <= high:
                    raise ArchiveError(f"{f.name} must be {low} to {high}, got {value!r}")
            allowed = f.metadata.get("allowed", (value,))
            if value not in allowed:
                raise ArchiveError(f"{f.name} must be {', '.join(allowed)}, got {value!r}")
            if isinstance(value, list):  # of JSON
                object.__setattr__(self, f.name, tuple(value))

    @classmethod
    def parse(cls: type[_T], values: object, source: str) -> _T:
        """Build the dataclass from a mapping; raise an `ArchiveError` that names a wrong key."""
        if not isinstance(values, Mapping):
            raise ArchiveError(f"{source}: expected keys and values, got {values!r}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key, value in values.items():
            if key not in fields:
                allowed = ", ".join(sorted(fields))
                raise ArchiveError(f"{source}: unknown key {key!r}; allowed are: {allowed}")
            _check_type(fields[key], value, source)
        default = dataclasses.MISSING
        missing = [
            name
            for name, f in fields.items()
            if name not in values and f.default is default and f.default_factory is default
        ]
        if missing:
            raise ArchiveError(f"{source}: missing key {', '.join(missing)}")
        try:
            return cls(**values)
        except ArchiveError as error:
            raise ArchiveError(f"{source}: {error}") from error


def _check_type(f: "dataclasses.Field[Any]", value: object, source: str) -> None:
    expected = getattr(f.type, "__origin__", f.type)
    assert isinstance(expected, type), f"{f.name}: a settings field must be annotated with a class"
    # In Python a bool is an int, but `topk: true` is a mistake.
    is_stray_bool = isinstance(value, bool) and expected is not bool
    if is_stray_bool or not isinstance(value, _ACCEPTED_TYPES.get(expected, (expected,))):
        raise ArchiveError(f"{source}: {f.name} must be {expected.__name__}, got {value!r}")


@dataclass(frozen=True)
class Settings(_Checked):
    """Section `handler` of `model-config.yaml`; each key is optional.

    Attributes:
        topk: default number of predictions, 1 or more.
        threshold: default confidence threshold, 0 to 1. With the activation sigmoid the model
            card's thresholds count instead.
        max_pixels: width times height, of all images of a request together, above which an image
            is rejected before it is decoded.
        max_seconds: of CPU, to decode all images of a request together; one that takes longer is
            rejected.
        max_images: images that one request may hold.
        max_batch: images that go through the model in one call; a worker keeps their memory.
        reduced_decoding: decode large JPEGs at a fraction of their size, twice as fast;
            within 3 levels of 255 of the exact result.
        require_precision: stop if the archive's precision fails its check on this processor,
            instead of serving float32.
    """

    topk: int = _bounded(5, 1, 1_000_000)
    threshold: float = _bounded(0.1, 0, 1)
    max_pixels: int = _bounded(64_000_000, 1, 1_000_000_000)
    max_seconds: float = _bounded(1.3, 0.1, 50)
    max_images: int = _bounded(16, 1, 1_000)
    max_batch: int = _bounded(16, 1, 1_024)
    reduced_decoding: bool = True
    require_precision: bool = False

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any] | None) -> "Settings":
        """Read the whole of `model-config.yaml`, as TorchServe passes it to the handler."""
        section = (model_config or {}).get("handler") or {}
        return cls.parse(section, "model-config.yaml, section 'handler'")


@dataclass(frozen=True)
class Preprocessing(_Checked):
    """The conversion of an image to the model's input; the defaults are the tutorial's.

    Attributes:
        resize: length after resizing, in pixels: of the shorter side with fit "crop", of both
            sides with "squash", of the longer side with "pad".
        crop: side of the center square, in pixels; with "pad" it may be larger than `resize`, and
            the border has the color of the mean.
        mean: subtracted per channel, in the model's order, on the scale 0 to 1.
        std: divisor per channel after subtracting the mean, in the same order and scale.
        interpolation: the resampling filter; bilinear and bicubic are antialiased.
        fit: the method to make an image square.
        channels: the model's order of channels.
        crop_rounding: rounding of a crop position at half a pixel: "even" as in torchvision and
            timm, "down" as in transformers.
    """

    resize: int = _bounded(255, 1, 4096)
    crop: int = _bounded(224, 1, 4096)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = _one_of("bilinear", "nearest", "bicubic")
    fit: str = _one_of("crop", "squash", "pad")
    channels: str = _one_of("rgb", "bgr")
    crop_rounding: str = _one_of("even", "down")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(map(_is_float32, values)):
                raise ArchiveError(f"{name} must be three numbers of float32, got {values!r}")
        if not all(value > 0 for value in self.std):
            raise ArchiveError(f"std must be above 0, got {self.std!r}")
        if self.crop > self.resize and self.fit != "pad":
            raise ArchiveError(f"crop {self.crop} is larger than resize {self.resize}")


@dataclass(frozen=True)
class ModelCard(_Checked):
    """`model-card.json`: the description of the packed model.

    Attributes:
        architecture: name in torchvision's model registry.
        classes: number of classes, the length of the logits.
        trained: false if the weights are seeded random numbers.
        weights_file: name of the file that contained the weights.
        weights_sha256: SHA-256 of that file, or of the random weights' values.
        inputs_sha256: digest of everything the archive was built from, to detect an outdated one.
        preprocessing: the conversion of an image to the model's input.
        features: the node of the architecture's graph, in torchvision's naming, whose output is the
            last feature maps; empty if the logits are not a linear function of their means, so that
            there is no class activation map.
        precision: the precision in which the model was checked.
        activation: softmax for one class per image, sigmoid for multi-label models.
        thresholds: with sigmoid, the confidence threshold of each class, 0 to 1; empty with
            softmax.
        embedding: channels of the pooled last features, the last layer's input; 0 if the model
            does not output them.
        trained_model: with random weights, the name of a trained model that is served with this
            one; empty if there is none.
    """

    architecture: str
    classes: int
    trained: bool
    weights_file: str
    weights_sha256: str
    inputs_sha256: str
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    features: str = ""
    precision: str = _one_of(*PRECISIONS)
    activation: str = _one_of("softmax", "sigmoid")
    thresholds: tuple[float, ...] = ()
    embedding: int = _bounded(0, 0, 1_000_000)
    trained_model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = self.classes if self.multilabel else 0
        if len(self.thresholds) != expected or not all(map(_is_share, self.thresholds)):
            raise ArchiveError(
                f"for the activation {self.activation} thresholds must be {expected} numbers from "
                "0 to 1"
            )

    @classmethod
    def load(cls, path: Path) -> "ModelCard":
        """Read `model-card.json`; raise `ArchiveError` if it is missing or malformed."""
        try:
            return cls.from_json(path.read_bytes())
        except OSError as error:
            raise ArchiveError(f"{path.name}: cannot be read: {error.strerror}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelCard":
        """Parse the text of a `model-card.json`; raise `ArchiveError` if it is malformed."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ArchiveError(f"{MODEL_CARD}: not JSON: {error}") from error
        if isinstance(values, dict) and "preprocessing" in values:
            source = f"{MODEL_CARD}, 'preprocessing'"
            values["preprocessing"] = Preprocessing.parse(values["preprocessing"], source)
        return cls.parse(values, MODEL_CARD)

    def to_json(self) -> str:
        """Return the text that `from_json` parses."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def multilabel(self) -> bool:
        """Return whether an image can have any number of labels."""
        return self.activation == "sigmoid"

    @property
    def fast_resize(self) -> bool:
        """Return whether to resize with SIMD, within 2 levels of 255; see `decoding.transform`."""
        return self.precision != "float32"

    @property
    def warning(self) -> str | None:
        """Return the warning that every response must contain, if any."""
        if self.trained:
            return None
        warning = "untrained random weights: this answer means nothing and only shows the service"
        if self.trained_model:
            warning += f"; /predictions/{self.trained_model} has a trained model"
        return warning


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_float32(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= _MAX_FLOAT32
