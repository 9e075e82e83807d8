"""Implement the stages of the batch job: decode in tasks, classify in actors.

`handler` is the archive's if `batch.archive` loaded it first.
"""

import handler  # noqa: F401, I001  # sets variables before ONNX Runtime is imported

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handler.archive import Archive
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.decoding.pillow import DecodedImage
from handler.errors import NoEmbedding, RequestError, TooLarge
from handler.inference.allocator import keep_freed_memory
from handler.inference.cores import Cores
from handler.inference.engines import Extra
from handler.pipeline import Pipeline
from handler.protocols.options import parse_options
from handler.request import Options, RequestImage, run_isolated
from handler.settings import MAX_REQUEST_BYTES


@dataclass(frozen=True)
class Choices:
    """Options of a job; None for the archive's default.

    Attributes:
        topk: number of predictions, 1 or more.
        threshold: confidence threshold, 0 to 1.
        embedding: include the embedding in each row.
    """

    topk: int | None = None
    threshold: float | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Description:
    """The properties of an archive that a job needs.

    Attributes:
        multilabel: whether the model is multi-label.
        warning: the warning that every row must contain; None for a trained model.
        wants_gpu: whether the model runs on PyTorch, which uses a GPU if there is one.
    """

    multilabel: bool
    warning: str | None
    wants_gpu: bool


def describe(folder: Path, choices: Choices) -> Description:
    """Read an unpacked archive, except the model.

    Raises:
        ArchiveError: a part is missing or malformed.
        RequestError: an option is invalid, or the archive has no embeddings.
    """
    archive = Archive.load(folder)
    _options(archive, choices)
    card = archive.card
    return Description(card.multilabel, card.warning, archive.model_file.suffix == ".pth")


class Decoder:
    """Decodes encoded images, with the server's limits for one image per request."""

    def __init__(self, folder: Path) -> None:
        """Read the settings from an unpacked archive."""
        self._archive = Archive.load(folder)
        keep_freed_memory()

    def pixels(self, content: bytes, *, isolated: bool = False) -> bytes:
        """Return an encoded image as the model's input, uint8 (3, crop, crop), as bytes.

        With `isolated`, it is decoded in a separate process, which it may crash.

        Raises:
            RequestError: the server would reject the image.
        """
        if len(content) > MAX_REQUEST_BYTES:
            raise TooLarge(
                f"The image has {len(content):,} bytes; at most {MAX_REQUEST_BYTES:,} are read."
            )
        settings = self._archive.settings
        return decode(
            content,
            self._archive.card.preprocessing,
            PixelBudget(settings.max_pixels, settings.max_seconds),
            reduced=settings.reduced_decoding,
            fast_resize=self._archive.card.fast_resize,
            isolated=isolated,
        ).pixels.tobytes()


class Classifier:
    """Loads the model and classifies decoded images.

    Attributes:
        precision: the served precision, see `handler.inference.engines.Engine`.
        fallback: the reason if it differs from the archive's precision; empty otherwise.
    """

    def __init__(
        self, folder: Path, choices: Choices, threads: int = 1, gpu: int | None = None
    ) -> None:
        """Load an unpacked archive; `threads` are CPU threads, `gpu` is a GPU's number or None."""
        archive = Archive.load(folder)
        self._options = _options(archive, choices)
        with tempfile.NamedTemporaryFile() as own:
            # A private lock file: the number of threads does not depend on other processes.
            cores = Cores(threads, threads, Path(own.name))
        self._pipeline = Pipeline(archive, cores, gpu)
        self.precision = self._pipeline.engine.precision
        self.fallback = self._pipeline.fallback
        self._crop = archive.card.preprocessing.crop
        keep_freed_memory()

    def results(
        self, pixels: Sequence[bytes | memoryview]
    ) -> Iterator[dict[str, Any] | RequestError]:
        """Yield the server's result, see `handler.results`, or error for each `Decoder.pixels`."""
        side = self._crop
        images = []
        for number, data in enumerate(pixels):
            array = np.frombuffer(data, np.uint8).reshape(3, side, side)
            decoded = DecodedImage(array, (side, side), (0, 0, side, side))
            extra = Extra.EMBEDDING if self._options.embedding else None
            images.append(RequestImage(str(number), "", decoded=decoded, extra=extra))
        self._pipeline.infer(images)
        for image in images:
            run_isolated(image, lambda one: self._pipeline.fill_result(one, self._options))
            result = image.error or image.result
            assert result is not None
            yield result


def _options(archive: Archive, choices: Choices) -> Options:
    given = {name: value for name, value in asdict(choices).items() if value is not None}
    if choices.embedding and not archive.card.embedding:
        raise NoEmbedding(
            "This archive gives no embeddings: it was built for PyTorch (engine: torch), or its "
            "last layer is no linear one."
        )
    return parse_options(given, archive.options)
