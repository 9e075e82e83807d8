"""The model store: the folder of model archives, and their model cards.

This module does not import PyTorch, so that commands that only read archives start fast.
"""

import hashlib
import zipfile
from pathlib import Path

from handler.errors import ArchiveError
from handler.settings import MODEL_CARD, ModelCard

MODEL_STORE = Path("model_store")
DEFAULT_ARCHITECTURE = "densenet121"
# Its trained weights are a Python package, see `scripts/build/sources/efficientnet_lite0.py`.
PACKAGED_ARCHITECTURE = "efficientnet_lite0"

# File in a model archive with the license of its weights, if that must accompany them.
WEIGHTS_NOTICE = "WEIGHTS-NOTICE.txt"


def read_card(archive: Path) -> ModelCard | None:
    """Return the model card of an archive or unpacked archive; None if it is missing or invalid."""
    try:
        if archive.is_dir():
            return ModelCard.from_json((archive / MODEL_CARD).read_bytes())
        with zipfile.ZipFile(archive) as content:
            return ModelCard.from_json(content.read(MODEL_CARD))
    except (OSError, zipfile.BadZipFile, KeyError, ArchiveError):
        return None


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
