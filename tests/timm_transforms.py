"""timm's own preprocessing."""

from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform


def timm_transform(name: str, **changes: Any) -> Any:
    """Return timm's transform of a model, from an RGB image to float32 (3, crop, crop)."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    resolved = resolve_data_config({}, pretrained_cfg=config.to_dict())  # type: ignore[no-untyped-call]
    return create_transform(**{**resolved, **changes})
