"""What the container serves, and where: from the command line and the environment it is given."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The image's own archives.
MODEL_STORE = HERE.parents[1] / "model_store"
_LARGEST_PORT = 65535


class Refused(Exception):  # noqa: N818
    """The container cannot serve as it is asked to; the message is for who started it."""


@dataclass(frozen=True)
class Serving:
    """What is served, and where.

    Attributes:
        archives: one or more `.mar` files of one folder.
        port: where nginx listens for requests, on all addresses.
        workers: for each model; None for as many as the container's limits hold.
        properties: lines of TorchServe's configuration, which count before those of the image.
        locations: nginx's locations beside the image's own, as text.
        environment: variables that TorchServe and its workers get beside the container's.
    """

    archives: tuple[Path, ...]
    port: int = 8080
    workers: int | None = None
    properties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    locations: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def model_store(self) -> Path:
        """The folder of the archives."""
        return self.archives[0].parent

    @property
    def models(self) -> tuple[str, ...]:
        """Their names; the first one is meant where a request names none."""
        return tuple(archive.stem for archive in self.archives)


def chosen(arguments: Sequence[str], environment: Mapping[str, str]) -> Serving:
    """Decides what is served.

    Args:
        arguments: what stands behind the image's name on the command line.
        environment: `PORT` and `WORKERS` of it.

    Raises:
        Refused: an argument or a variable cannot be used, or there is no archive.
    """
    if arguments:
        raise Refused(f"The image takes no argument, and got: {' '.join(arguments)}.")
    return Serving(
        archives=archives_in(MODEL_STORE),
        port=_number(environment, "PORT", _LARGEST_PORT) or Serving.port,
        workers=_number(environment, "WORKERS", 1024),
    )


def archives_in(folder: Path) -> tuple[Path, ...]:
    """The archives of a folder by their names; `Refused` where there is none."""
    archives = tuple(sorted(folder.glob("*.mar")))
    if not archives:
        raise Refused(f"There is no archive (*.mar) in {folder}.")
    return archives


def _number(environment: Mapping[str, str], name: str, most: int) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= most:
        raise Refused(f"{name} must be a whole number from 1 to {most}, got {text!r}.")
    return int(text)
