"""From bytes to an answer: the handler's stages, without TorchServe or Ray.

`handler` is the archive's own where `batch.archive` came first.
"""

import handler  # noqa: F401, I001  # before ONNX Runtime is imported, see there

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from handler import responses
from handler.allocator import keep_freed_memory
from handler.cores import Cores
from handler.errors import InvalidOption, NoEmbedding, RequestError, TooLarge
from handler.exchange import EMBEDDING, Options
from handler.images import PixelBudget, decode
from handler.labels import CLASS_INDEX, load_class_index
from handler.multilabel import sigmoid
from handler.precision import load_precise
from handler.settings import MAX_REQUEST_BYTES, MODEL_CARD, ModelCard, Settings

__all__ = [
    "MAX_REQUEST_BYTES",
    "Choices",
    "Classifier",
    "Decoder",
    "Description",
    "RequestError",
    "describe",
]

_MANIFEST = Path("MAR-INF", "MANIFEST.json")


@dataclass(frozen=True)
class Choices:
    """What a person may choose; None for what the archive says.

    Attributes:
        topk: predictions wanted, 1 or more.
        threshold: least probability, 0 to 1, that counts as recognised.
        embedding: each row holds the pooled last features too.
    """

    topk: int | None = None
    threshold: float | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Description:
    """What the archive is, as far as the rows depend on it.

    Attributes:
        multilabel: whether it gives several labels a picture.
        warning: what every row must say; None of a trained model.
        wants_gpu: whether it runs on PyTorch, which uses a GPU where there is one.
    """

    multilabel: bool
    warning: str | None
    wants_gpu: bool


def describe(folder: Path, choices: Choices) -> Description:
    """Reads an unpacked archive's parts, all but the model.

    Raises:
        ArchiveError: a part is missing or malformed.
        RequestError: the archive does not give what was chosen.
    """
    card = ModelCard.load(folder / MODEL_CARD)
    load_class_index(folder / CLASS_INDEX, card.classes)
    _options(folder, card, choices)
    return Description(
        card.multilabel,
        card.warning,
        _manifest(folder)["serializedFile"].endswith(".pth"),
    )


class Decoder:
    """From encoded bytes to pixels, with the server's bounds for one picture a request."""

    def __init__(self, folder: Path) -> None:
        """Reads the settings from an unpacked archive."""
        self._settings = _settings(folder)
        self._preprocessing = ModelCard.load(folder / MODEL_CARD).preprocessing
        keep_freed_memory()

    def pixels(self, content: bytes, *, isolated: bool = False) -> bytes:
        """From an encoded picture to the model's input.

        Args:
            content: the picture.
            isolated: decode it in a process of its own, which it may end.

        Returns:
            uint8 (3, crop, crop) as bytes.

        Raises:
            RequestError: the server would refuse it.
        """
        if len(content) > MAX_REQUEST_BYTES:
            raise TooLarge(
                f"The picture has {len(content):,} bytes; at most {MAX_REQUEST_BYTES:,} are read."
            )
        budget = PixelBudget(self._settings.max_pixels, self._settings.max_seconds)
        reduced = self._settings.reduced_decoding
        pixels = decode(content, self._preprocessing, budget, reduced=reduced, isolated=isolated)
        return pixels.tobytes()


class Classifier:
    """From pixels to an answer; loads the model.

    Attributes:
        precision: what it computes in, see `handler.engines.Engine`.
        fallback: why that is not the archive's; empty where it is.
    """

    def __init__(
        self, folder: Path, choices: Choices, threads: int = 1, gpu: int | None = None
    ) -> None:
        """Args: an unpacked archive, what was chosen, CPU threads, and the GPU's number if any."""
        self._card = ModelCard.load(folder / MODEL_CARD)
        self._labels = load_class_index(folder / CLASS_INDEX, self._card.classes)
        self._options = _options(folder, self._card, choices)
        with tempfile.NamedTemporaryFile() as own:
            # Nobody shares it: how many threads there are does not depend on others.
            cores = Cores(threads, threads, Path(own.name))
        required = _settings(folder).require_precision
        file = folder / _manifest(folder)["serializedFile"]
        self._engine, self.fallback = load_precise(
            file, self._card, cores, gpu=gpu, required=required
        )
        self.precision = self._engine.precision
        crop = self._card.preprocessing.crop
        self._shape = (3, crop, crop)
        self._max_batch = _settings(folder).max_batch
        keep_freed_memory()

    def answers(
        self, pictures: Sequence[bytes | memoryview]
    ) -> Iterator[dict[str, Any] | Exception]:
        """The server's result for each picture, see `handler.responses`, or why it has none.

        Args:
            pictures: each uint8 (3, crop, crop), as `Decoder` gives them.
        """
        for start in range(0, len(pictures), self._max_batch):
            some = pictures[start : start + self._max_batch]
            try:
                yield from self._together(some)
            except Exception:
                # As the server does: one by one, to lose only the culprit.
                yield from map(self._alone, some)

    def _alone(self, picture: bytes | memoryview) -> dict[str, Any] | Exception:
        try:
            return self._together([picture])[0]
        except Exception as error:
            return error

    def _together(self, pictures: Sequence[bytes | memoryview]) -> list[dict[str, Any]]:
        images = np.stack([np.frombuffer(one, np.uint8).reshape(self._shape) for one in pictures])
        made: tuple[NDArray[np.float32], ...]
        if self._options.embedding:
            made = self._engine.logits_and_embedding(images)
        else:
            made = (self._engine.logits(images),)
        if not all(np.isfinite(values).all() for values in made):
            raise ValueError("the model's output is not finite")
        return [self._answer(*values) for values in zip(*made, strict=True)]

    def _answer(
        self, logits: NDArray[np.float32], embedding: NDArray[np.float32] | None = None
    ) -> dict[str, Any]:
        if self._card.multilabel:
            result = responses.multilabel(sigmoid(logits), self._labels, self._options)
        else:
            probabilities = responses.softmax(logits)
            result = responses.classification(probabilities, self._labels, self._options)
        if embedding is not None:
            result[EMBEDDING] = embedding
        return result


def _manifest(folder: Path) -> Any:
    return json.loads((folder / _MANIFEST).read_text("utf-8"))["model"]


def _settings(folder: Path) -> Settings:
    text = (folder / _manifest(folder)["configFile"]).read_text("utf-8")
    return Settings.from_model_config(yaml.safe_load(text))


def _options(folder: Path, card: ModelCard, choices: Choices) -> Options:
    options = Options.defaults(_settings(folder), card)
    if choices.topk is not None:
        if choices.topk < 1:
            raise InvalidOption(f"topk must be 1 or more, got {choices.topk}.")
        options = replace(options, topk=choices.topk)
    if choices.threshold is not None:
        if not 0 <= choices.threshold <= 1:
            raise InvalidOption(f"threshold must be from 0 to 1, got {choices.threshold}.")
        options = replace(options, threshold=choices.threshold)
    if choices.embedding and not card.embedding:
        raise NoEmbedding(
            "This archive gives no embeddings: it was built for PyTorch (engine: torch), or its "
            "last layer is no linear one."
        )
    return replace(options, embedding=choices.embedding)
