"""The unpacked archive: model card, class index, settings and model file, read and checked once."""

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
    """What is served.

    Attributes:
        model_file: the float32 model; the archive's other files are in the same folder.
        card: what the builder wrote about the model.
        labels: a class for each position of the logits.
        settings: the operator's.
        name: of the model as it is served, which may differ from the archive's name.
        version: of the model.
    """

    model_file: Path
    card: ModelCard
    labels: Sequence[Label]
    settings: Settings
    name: str
    version: str

    @classmethod
    def load(cls, folder: Path, name: str = "") -> "Archive":
        """Read an unpacked archive's parts, all but the model; `name` overrides the archive's.

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

        Args:
            folder: of the unpacked archive.
            manifest: the section `model` of its manifest.
            config: its `model-config.yaml`.
            name: overrides the manifest's.
        """
        settings = Settings.from_model_config(config)
        card = ModelCard.load(folder / MODEL_CARD)
        return cls(
            folder / manifest["serializedFile"],
            card,
            load_class_index(folder / CLASS_INDEX, card.classes),
            settings,
            name or manifest["modelName"],
            manifest["modelVersion"],
        )

    @property
    def options(self) -> Options:
        """The options of a request that chooses nothing."""
        multilabel = self.card.multilabel
        threshold = thresholds(self.card) if multilabel else self.settings.threshold
        return Options(topk=self.settings.topk, threshold=threshold)

    @property
    def warning(self) -> Body:
        """What every JSON body must hold about this model, if anything."""
        return {"warning": self.card.warning} if self.card.warning else {}
