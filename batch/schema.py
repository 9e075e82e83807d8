"""The columns of the results: one row a picture, whether it was classified or not."""

from typing import Any

import pyarrow as pa

# Of the columns; a folder of results has those of one version.
VERSION = 2

ARCHIVE = "archive_sha256"
PRECISION = "precision"

# Between the stages only.
PART = "part"
PIXELS = "pixels"

_LABELS = pa.list_(pa.string())

# Of a picture that cannot be classified; both null for one that was.
ERROR_FIELDS = [pa.field("error_type", pa.string()), pa.field("error_message", pa.string())]


def decoded() -> Any:
    """What the model's actors get: pixels uint8 (3, crop, crop) as bytes, or an error."""
    fields = [pa.field(PART, pa.int64()), pa.field("path", pa.string())]
    return pa.schema([*fields, pa.field(PIXELS, pa.binary()), *ERROR_FIELDS])


def results(*, multilabel: bool, embedding: bool) -> Any:
    """The columns of a file of results.

    Args:
        multilabel: whether the archive gives several labels a picture.
        embedding: whether the pooled last features were asked for.
    """
    fields = [
        pa.field("path", pa.string(), nullable=False),
        # The predictions, best first; all three have the same length.
        pa.field("labels", _LABELS),
        pa.field("class_ids", _LABELS),
        pa.field("probabilities", pa.list_(pa.float64())),
        pa.field("recognized", pa.bool_()),
    ]
    if multilabel:
        # The names of all classes that reach their thresholds, most probable first.
        fields.append(pa.field("passing", _LABELS))
    fields += ERROR_FIELDS
    if embedding:
        fields.append(pa.field("embedding", pa.list_(pa.float32())))
    fields += [
        # Of a model with untrained weights: its answers mean nothing.
        pa.field("warning", pa.string()),
        # What the model computed in, which may be another than the archive's.
        pa.field(PRECISION, pa.string(), nullable=False),
        pa.field(ARCHIVE, pa.string(), nullable=False),
    ]
    return pa.schema(fields)
