"""Define the columns of the results: one row per image, classified or rejected."""

from typing import Any

import pyarrow as pa

# Version of the columns. All results in a folder have the same version.
VERSION = 2

ARCHIVE = "archive_sha256"
PRECISION = "precision"

# Columns that only the stages exchange.
PART = "part"
PIXELS = "pixels"

_LABELS = pa.list_(pa.string())

# Null if the image was classified.
ERROR_FIELDS = [pa.field("error_type", pa.string()), pa.field("error_message", pa.string())]


def decoded() -> Any:
    """Return the schema of the model's input: uint8 (3, crop, crop) as bytes, or an error."""
    fields = [pa.field(PART, pa.int64()), pa.field("path", pa.string())]
    return pa.schema([*fields, pa.field(PIXELS, pa.binary()), *ERROR_FIELDS])


def results(*, multilabel: bool, embedding: bool) -> Any:
    """Return the schema of a result file."""
    fields = [
        pa.field("path", pa.string(), nullable=False),
        # The predictions, most probable first; all three lists have the same length.
        pa.field("labels", _LABELS),
        pa.field("class_ids", _LABELS),
        pa.field("probabilities", pa.list_(pa.float64())),
        pa.field("recognized", pa.bool_()),
    ]
    if multilabel:
        # Names of all classes that reach their thresholds, most probable first.
        fields.append(pa.field("passing", _LABELS))
    fields += ERROR_FIELDS
    if embedding:
        fields.append(pa.field("embedding", pa.list_(pa.float32())))
    fields += [
        # Set for a model with untrained weights, whose predictions are meaningless.
        pa.field("warning", pa.string()),
        # The precision that was served; after a fallback it differs from the archive's.
        pa.field(PRECISION, pa.string(), nullable=False),
        pa.field(ARCHIVE, pa.string(), nullable=False),
    ]
    return pa.schema(fields)
