"""Photographs whose content is beyond doubt, with the correct labels.

scikit-image and scikit-learn document the content of theirs. Those of foolbox are photographs of
ImageNet's validation set, with the class in the file's name. `KNOWN` leaves out six of its twenty,
whose content is disputable: two cars, a shoe, a window, a beetle and a drum. `IMAGENET` has them.
"""

from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import skimage
import sklearn

_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"


@dataclass(frozen=True)
class Photograph:
    """A file, and ImageNet's labels of its content."""

    path: Path
    labels: frozenset[str]


def _foolbox(name: str, *labels: str) -> Photograph:
    # Importing foolbox would load too many packages.
    path = distribution("foolbox").locate_file(f"foolbox/data/imagenet_{name}.jpg")
    return Photograph(Path(str(path)), frozenset(labels))


CAT_LABELS = frozenset({"tiger_cat", "Egyptian_cat", "tabby"})

KNOWN = (
    Photograph(_SKIMAGE / "chelsea.png", CAT_LABELS),
    Photograph(_SKIMAGE / "coffee.png", frozenset({"espresso", "cup", "coffee_mug"})),
    Photograph(_SKIMAGE / "rocket.jpg", frozenset({"missile", "projectile", "space_shuttle"})),
    # ImageNet has no motorcycles; these are similar.
    Photograph(_SKIMAGE / "motorcycle_left.png", frozenset({"moped", "motor_scooter"})),
    Photograph(_SKIMAGE / "camera.png", frozenset({"tripod"})),
    # The Summer Palace in Beijing.
    Photograph(_SKLEARN / "china.jpg", frozenset({"palace", "monastery"})),
    _foolbox("00_243", "bull_mastiff"),
    _foolbox("01_559", "folding_chair"),
    _foolbox("02_438", "beaker"),
    _foolbox("03_990", "buckeye"),
    _foolbox("04_949", "strawberry"),
    _foolbox("05_853", "thatch"),
    _foolbox("08_915", "yurt"),
    _foolbox("09_455", "bottlecap"),
    _foolbox("13_471", "cannon"),
    _foolbox("14_129", "spoonbill"),
    _foolbox("15_99", "goose"),
    _foolbox("16_251", "dalmatian"),
    _foolbox("17_22", "bald_eagle"),
    _foolbox("18_317", "leafhopper"),
)

# foolbox's photographs, and their classes in ImageNet.
IMAGENET = {
    path: int(path.stem.rpartition("_")[2])
    for path in sorted(KNOWN[-1].path.parent.glob("imagenet_*.jpg"))
}

# All photographs of scikit-image and scikit-learn.
_NAMES = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png"),
    *("coins.png", "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg"),
    *("rocket.jpg", "text.png"),
)
PHOTOGRAPHS = (
    *(_SKIMAGE / name for name in _NAMES),
    *(_SKLEARN / name for name in ("china.jpg", "flower.jpg")),
)
