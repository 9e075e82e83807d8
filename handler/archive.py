"""Read and check an unpacked archive: model card, class index, settings and model file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from handler.errors import ArchiveError
from handler.inference.activation import thresholds
from handler.labels import CLASS_INDEX, Label, load_class_index
from handler.request import Body, Options
from handler.settings import MODEL_CARD, ModelCard, Settings

_MANIFEST = Path("MAR-INF", "MANIFEST.json")


@dataclass(frozen=True)
class Archive:
    """An unpacked archive.

    Attributes:
        model_file: the float32 model; the archive's other files are in the same folder.
        card: the model card that the builder wrote.
        labels: the class for each position of the logits.
        settings: the operator's settings.
        name: the name under which the model is served; may differ from the archive's name.
        version: the model's version.
    """

    model_file: Path
    card: ModelCard
    labels: Sequence[Label]
    settings: Settings
    name: str
    version: str

    @classmethod
    def load(cls, folder: Path, name: str = "") -> "Archive":
        """Read an unpacked archive except the model; `name` overrides the archive's name.

        Raises:
            ArchiveError: a part is missing or malformed.
        """
        try:
            manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))["model"]
            config = yaml.safe_load((folder / manifest["configFile"]).read_text("utf-8"))
        except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
            raise ArchiveError(f"{folder.name}: cannot be read as an archive: {error}") from error
        return cls.from_parts(folder, manifest, config, name)

    @classmethod
    def from_parts(
        cls,
        folder: Path,
        manifest: Mapping[str, Any],
        config: Mapping[str, Any] | None,
        name: str = "",
    ) -> "Archive":
        """Read the parts that TorchServe does not pass to the handler.

        It passes the section `model` of the manifest, the content of `model-config.yaml`, and the
        name, which overrides the manifest's.
        """
        card = ModelCard.load(folder / MODEL_CARD)
        return cls(
            folder / manifest["serializedFile"],
            card,
            load_class_index(folder / CLASS_INDEX, card.classes),
            Settings.from_model_config(config),
            name or manifest["modelName"],
            manifest["modelVersion"],
        )

    @property
    def options(self) -> Options:
        """Return the default options of a request."""
        multilabel = self.card.multilabel
        threshold = thresholds(self.card) if multilabel else self.settings.threshold
        return Options(topk=self.settings.topk, threshold=threshold)

    @property
    def warning(self) -> Body:
        """Return the warning that every JSON response must contain; empty if there is none."""
        return {"warning": self.card.warning} if self.card.warning else {}
