"""Explain a prediction: compute a class activation map and draw it as a heat map.

DenseNet, like many architectures, ends in a mean over all positions and one linear layer. A class's
logit is therefore a sum over the positions, and each position's contribution is known exactly,
without a gradient (Zhou et al., "Learning Deep Features for Discriminative Localization",
arXiv:1512.04150).
"""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.decoding.pillow import DecodedImage
from handler.errors import ArchiveError

# The linear layer's weights, float32 (classes, channels), in a separate file, since the model does
# not output them.
CLASSIFIER = "classifier.npy"

# Maximum side of a heat map, in pixels. Even incompressible noise of this size is a PNG of 3.2 MB;
# a response above TorchServe's max_response_size of 6.5 MB would crash the worker.
MAX_SIDE = 1024

# Viridis (matplotlib, CC0), from purple to yellow: perceptually uniform, and readable with any kind
# of color vision. The web UI uses the same five colors.
HEAT_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

# Opacity of the overlay at the map's maximum; at its minimum it is 0.
_MAX_ALPHA = 0.65

# Relative brightness of the parts outside the model's input.
_UNSEEN_BRIGHTNESS = 0.4

# Pillow's fastest compression: a third of the default's time, a tenth more bytes.
_PNG_COMPRESSION = 1


def load_classifier(path: Path, classes: int) -> NDArray[np.float32]:
    """Map `classifier.npy`, float32 (classes, channels), into memory; it is read on first use.

    Raises:
        ArchiveError: the file is missing, malformed, or made for another number of classes.
    """
    try:
        weights: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
    if weights.dtype != np.float32 or weights.shape[:-1] != (classes,):
        raise ArchiveError(
            f"{path.name}: expected float32 ({classes}, channels), "
            f"got {weights.dtype} {weights.shape}"
        )
    return weights


def class_activation_map(
    features: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the contribution of each position to a class's logit: float32 (height, width).

    Its sum is the logit minus the class's bias. `features` are float32 (channels, height, width),
    one image's last; `weights` are float32 (channels,), the class's row of the classifier.
    """
    positions = features.shape[1] * features.shape[2]
    result: NDArray[np.float32] = np.tensordot(weights, features, axes=1) / np.float32(positions)
    return result


def heat_map(image: DecodedImage, activation: NDArray[np.float32]) -> bytes:
    """Draw an activation map over the part of the image in the model's input, and dim the rest.

    The colors range from the minimum of the map, float32 (height, width), to its maximum, so those
    of two images cannot be compared.

    Returns:
        a PNG of the size of the image's preview.
    """
    assert image.preview is not None
    # Gray, so that all colors come from the map.
    gray = image.preview.convert("L").convert("RGB")
    canvas = gray.point(lambda value: value * _UNSEEN_BRIGHTNESS)
    (left, right), (top, bottom) = (
        _span(image.crop[i], image.crop[i + 2], image.preview.size[i] / image.size[i])
        for i in (0, 1)
    )
    # Of a padded image, the input extends beyond the edges; `paste` cuts that off.
    seen = gray.crop((left, top, right, bottom))
    heat = _heat(activation, seen.size)
    seen.paste(
        Image.fromarray(_COLOR_TABLE[heat]),
        mask=Image.fromarray((heat * _MAX_ALPHA).astype(np.uint8)),
    )
    canvas.paste(seen, (left, top))
    encoded = io.BytesIO()
    canvas.save(encoded, "PNG", compress_level=_PNG_COMPRESSION)
    return encoded.getvalue()


def _span(start: float, end: float, scale: float) -> tuple[int, int]:
    """Return the extent of the model's input in whole pixels of the preview, at least one."""
    first = math.floor(start * scale)
    return first, max(first + 1, round(end * scale))


def _heat(activation: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return uint8 (height, width) of `size`: 0 at the map's minimum, 255 at its maximum."""
    low, high = float(activation.min()), float(activation.max())
    relative = (activation - low) / ((high - low) or 1)
    # Bilinear interpolation draws ridges and stars between the positions.
    smooth = Image.fromarray(relative).resize(size, Image.Resampling.BICUBIC)
    result: NDArray[np.uint8] = (np.asarray(smooth).clip(0, 1) * 255).round().astype(np.uint8)
    return result


def _color_table() -> NDArray[np.uint8]:
    """Return uint8 (256, 3): the RGB color of each heat value."""
    stops = np.linspace(0, 255, len(HEAT_COLORS))
    colors = np.array(HEAT_COLORS, np.float64)
    table = [np.interp(range(256), stops, colors[:, channel]) for channel in range(3)]
    return np.stack(table, axis=1).round().astype(np.uint8)


_COLOR_TABLE = _color_table()
