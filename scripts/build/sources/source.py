"""A model of any origin, before it is converted: its metadata, and its export to ONNX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.labels import Label
from handler.settings import Preprocessing
from scripts.build import onnx_model
from scripts.build.convert import Converted
from scripts.terminal import UserError

if TYPE_CHECKING:
    from torch import nn


class DownloadError(UserError):
    """A file of weights could not be fetched, or what arrived is not that file."""


class HostUnreachableError(DownloadError):
    """The weights' host cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model of any origin.

    Attributes:
        file: name of the file that the weights came from.
        sha256: of that file.
        outputs: number of values of the model's output; None if only a run shows it.
        preprocessing: fields of `Preprocessing` from the model's own files, or the architecture's.
        fixed: fields of `Preprocessing` that the model allows no other value for.
        labels: the classes that the model's own files name.
        trained: false for seeded random numbers.
        notice: text that must accompany copies of the weights.
        model: the model, if it is ONNX already.
    """

    architecture: str
    file: str
    sha256: str
    outputs: int | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[Label] | None = None
    trained: bool = True
    notice: str = ""
    model: onnx_model.Model | None = None

    def to_onnx(self, preprocessing: Preprocessing, folder: Path) -> onnx_model.Model:
        """Return the model as ONNX, from its own normalized input, of `crop` pixels, to its output.

        Temporary files go into `folder`.
        """
        assert self.model is not None
        return self.model

    def check(self, packed: Path, preprocessing: Preprocessing) -> None:
        """Compare the packed model with the framework that it was trained with, if there is one;
        raise `UserError` if they differ.
        """

    def for_pytorch(self, preprocessing: Preprocessing, target: Converted) -> str:
        """Write what the PyTorch engine loads, see `TorchvisionSource`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TorchSource(Source):
    """A PyTorch module from normalized float32 (N, 3, crop, crop) to float32 (N, outputs).

    It is in evaluation mode, on the CPU.
    """

    module: "nn.Module"

    def to_onnx(self, preprocessing: Preprocessing, folder: Path) -> onnx_model.Model:
        """See `Source.to_onnx`."""
        from scripts.build import export  # torch

        target = folder / "exported.onnx"
        export.write_onnx(self.module, preprocessing.crop, target, self.architecture)
        return replace(onnx_model.read(target), file="the exported model")

    def check(self, packed: Path, preprocessing: Preprocessing) -> None:
        """See `Source.check`."""
        from scripts.build import export  # torch

        export.compare(self.module, packed, preprocessing)
