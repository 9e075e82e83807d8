"""`PRECISION=bf16|int8`: calibrates on the user's pictures, and guards the accuracy.

Pictures come to the model as a server decodes them. What lower precision costs is measured on
pictures that calibration did not see; above the bounds nothing is packed.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from rich.status import Status

from classification_client.pictures import Found, search
from handler.cores import Cores
from handler.engines import Engine
from handler.errors import ArchiveError, ClientError
from handler.images import PixelBudget, decode
from handler.labels import Label
from handler.multilabel import sigmoid, thresholds
from handler.onnx_engine import OnnxEngine
from handler.precision import CHECK_IMAGES, CHECK_LABELS, MODEL_FILES, answers
from handler.responses import softmax
from handler.settings import PRECISIONS, ModelCard, Preprocessing, Settings
from scripts.build.guard import Bounds, Comparison, compare
from scripts.labels_file import FORM, read_labels
from scripts.labels_file import NAME as LABELS_FILE
from scripts.matching import match, meanings
from scripts.terminal import UserError, console, step, warn

# More pictures than these do not calibrate better (NNCF's own default).
CALIBRATION_PICTURES = 300
# Below this the ranges that calibration sees are those of a few pictures.
_FEW_TO_CALIBRATE = 100

# To measure on; the interval of 4,000 is narrow enough for every sensible bound.
EVALUATION_PICTURES = 4_000

# A worker asks its model for so many as it starts, in a third of a second.
CHECK_PICTURES = 24

# Share of the layers that stay in float32, from try to try, where all in int8 cost too much.
_KEPT = (0, 0.05, 0.15)
_SHOWN_LAYERS = 6

Images = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class LowerPrecision:
    """What is asked for instead of float32.

    Attributes:
        name: "bf16" or "int8".
        calibrate: a folder of pictures for int8 to be calibrated on.
        evaluate: a folder of pictures to measure the cost on; None for a part of `calibrate`. Where
            its folders are called as the classes, or where it has a list of labels and the model
            gives several, what counts is whether answers are right.
        bounds: what it may cost.
    """

    name: str
    calibrate: Path | None = None
    evaluate: Path | None = None
    bounds: Bounds = field(default_factory=Bounds)

    def digest(self) -> str:
        """Changes whenever the result might."""
        digest = hashlib.sha256(f"{self.name} {self.bounds}".encode())
        for folder in filter(None, (self.calibrate, self.evaluate)):
            said = folder / LABELS_FILE
            digest.update(said.read_bytes() if said.is_file() else b"")
            for path in _search(folder):
                digest.update(f"{path.relative_to(folder)}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def chosen(
    precision: str,
    calibrate: Path | None = None,
    evaluate: Path | None = None,
    max_loss: float = Bounds.max_loss,
    agreement: float = Bounds.agreement,
) -> LowerPrecision | None:
    """What a person asked for, checked as far as no model is needed; None for float32.

    Args:
        precision: of `PRECISIONS`.
        calibrate: see `LowerPrecision`.
        evaluate: see `LowerPrecision`.
        max_loss: see `Bounds`.
        agreement: see `Bounds`.

    Raises:
        UserError: a choice is missing or makes no sense.
    """
    if precision not in PRECISIONS:
        raise UserError(f"PRECISION must be {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "float32":
        if calibrate or evaluate:
            raise UserError("CALIBRATE and EVALUATE are for PRECISION=bf16 or PRECISION=int8.")
        return None
    if precision == "int8" and calibrate is None:
        raise UserError(
            "PRECISION=int8 is calibrated on a few hundred pictures such as the model will get: "
            "CALIBRATE=folder"
        )
    if precision == "bf16" and calibrate is not None:
        raise UserError("PRECISION=bf16 needs no calibration. Leave CALIBRATE out.")
    if precision == "bf16" and evaluate is None:
        raise UserError(
            "What PRECISION=bf16 costs is measured on pictures such as the model will get: "
            "EVALUATE=folder"
        )
    for folder in (calibrate, evaluate):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} must be a folder of pictures.")
    return LowerPrecision(precision, calibrate, evaluate, Bounds(max_loss, agreement))


def make(
    wanted: LowerPrecision,
    model_file: Path,
    card: ModelCard,
    labels: Sequence[Label],
    folder: Path,
) -> None:
    """Makes all that an archive of lower precision holds beside the float32 model.

    Args:
        wanted: what is asked for.
        model_file: the float32 model, as ONNX.
        card: of the archive.
        labels: the model's classes, by position.
        folder: where to put the files.

    Raises:
        UserError: the cost is above the bounds, the weights are not trained, or a picture or a
            package is missing.
    """
    if not card.trained:
        raise UserError(
            f"PRECISION={wanted.name} needs trained weights. Random ones answer with near ties, so "
            "that it tells nothing of a trained model whether lower precision changes the answers."
        )
    try:
        from handler.openvino_engine import OpenVinoEngine  # noqa: PLC0415  # only where asked for
    except ImportError as error:
        raise UserError(
            f"PRECISION={wanted.name} needs packages that are not here: make setup-precision"
        ) from error
    for_calibration, for_evaluation, classes = split(wanted, labels, multilabel=card.multilabel)
    calibration = list(_decoded(for_calibration, card.preprocessing).values())
    decoded = _decoded(for_evaluation, card.preprocessing)
    evaluation = list(decoded.values())
    truth = None if classes is None else _truth([classes[path] for path in decoded], card)
    with tempfile.TemporaryDirectory() as beside:
        cpus = joblib.cpu_count()
        cores = Cores(cpus, cpus, Path(beside) / "busy")
        exact = OnnxEngine(model_file, cores)
        expected = _probabilities(exact, evaluation, card)
        least = thresholds(card) if card.multilabel else None

        def measured(lower_file: Path) -> tuple[Engine, Comparison]:
            try:
                engine = OpenVinoEngine(lower_file, wanted.name, cores)
            except ArchiveError as error:
                raise UserError(f"PRECISION={wanted.name} cannot be checked: {error}.") from error
            found = _probabilities(engine, evaluation, card)
            return engine, compare(expected, found, truth, least)

        if wanted.name == "int8":
            lower = _int8(wanted, model_file, calibration, folder, measured)
        else:
            lower, found = measured(model_file)
            _judge(wanted, found, "")
        _write_check(exact, lower, calibration or evaluation, card, folder)


def _int8(
    wanted: LowerPrecision,
    model_file: Path,
    calibration: Images,
    folder: Path,
    measured: Callable[[Path], tuple[Engine, Comparison]],
) -> Engine:
    """Quantises all layers, and where that costs too much, all but the costliest."""
    from scripts.build.quantize import costliest, quantise  # noqa: PLC0415  # only where asked for

    if len(calibration) < _FEW_TO_CALIBRATE:
        warn(
            f"{len(calibration)} pictures are few to calibrate on: their values stand for all that "
            f"the model will get. Give it {_FEW_TO_CALIBRATE} to {CALIBRATION_PICTURES}."
        )
    target = folder / MODEL_FILES["int8"]
    costs: list[tuple[str, float]] = []
    for share in _KEPT:
        kept = [name for name, _ in costs[: math.ceil(share * len(costs))]]
        step(f"Precision: quantising, calibrated on {len(calibration)} pictures")
        quantise(model_file, calibration, target, kept)
        engine, found = measured(target)
        if not found.excess(wanted.bounds):
            break
        with Status("Looking for the layers that cost most ...", console=console):
            costs = costs or costliest(model_file, target, calibration)
        worst = ", ".join(f"{name} ({noise:.0e})" for name, noise in costs[:_SHOWN_LAYERS])
        step(f"Precision: {found.excess(wanted.bounds)}. Most noise is added by: {worst}")
    _judge(wanted, found, ", ".join(name for name, _ in costs[:_SHOWN_LAYERS]))
    if kept:
        step(f"Precision: {len(kept)} layers stay in float32: {', '.join(kept)}")
    return engine


def _judge(wanted: LowerPrecision, found: Comparison, layers: str) -> None:
    """Says what lower precision costs; raises `UserError` where that is too much."""
    for line in found.report():
        step(f"Precision: {line}")
    excess = found.excess(wanted.bounds)
    if excess:
        where = f" Layers that cost most: {layers}." if layers else ""
        raise UserError(
            f"PRECISION={wanted.name} costs too much, and no archive was written: {excess}.{where} "
            "Calibrate on more pictures such as the model will get, or allow more with "
            f"{'MAX_LOSS' if found.loss else 'AGREEMENT'}=..."
        )
    doubt = found.doubt(wanted.bounds)
    if doubt:
        warn(doubt)


def _write_check(
    exact: Engine, lower: Engine, images: Images, card: ModelCard, folder: Path
) -> None:
    """Pictures on which the two agree, from the surest answer to the nearest tie."""
    some = np.stack(images[: 4 * CHECK_PICTURES])
    logits = exact.logits(some)
    labels = answers(logits, card)
    same = answers(lower.logits(some), card) == labels
    agreed = np.flatnonzero(same.reshape(len(some), -1).all(axis=1))
    by_margin = agreed[np.argsort(-_margins(logits[agreed], card), kind="stable")]
    spread = np.linspace(0, len(by_margin) - 1, min(CHECK_PICTURES, len(by_margin))).astype(int)
    np.save(folder / CHECK_IMAGES, some[by_margin[spread]], allow_pickle=False)
    np.save(folder / CHECK_LABELS, labels[by_margin[spread]], allow_pickle=False)


def _margins(logits: NDArray[np.float32], card: ModelCard) -> NDArray[np.float32]:
    """float32 (N,): how much must change before a picture is answered otherwise."""
    result: NDArray[np.float32]
    if card.multilabel:
        result = np.abs(sigmoid(logits) - thresholds(card)).min(axis=1)
    else:
        best = np.sort(logits, axis=1)
        result = best[:, -1] - best[:, -2]
    return result


def _probabilities(engine: Engine, images: Images, card: ModelCard) -> NDArray[np.float32]:
    """float32 (N, classes)."""
    shown = track(images, f"Classifying with {engine.name} ...", console=console, transient=True)
    logits = np.concatenate([engine.logits(image[None]) for image in shown])
    return sigmoid(logits) if card.multilabel else softmax(logits)


def _decoded(paths: Sequence[Path], preprocessing: Preprocessing) -> dict[Path, NDArray[np.uint8]]:
    """As a server decodes them; what it refuses is left out."""
    found, refused = {}, ""
    for path in paths:
        try:
            budget = PixelBudget(Settings.max_pixels, Settings.max_seconds)
            found[path] = decode(path.read_bytes(), preprocessing, budget)
        except (ClientError, OSError) as error:  # noqa: PERF203  # each picture on its own
            refused = f"{path}: {error}"
    if refused:
        warn(f"{len(paths) - len(found)} of {len(paths)} pictures cannot be read, as {refused}")
    if paths and not found:
        raise UserError("None of the pictures can be read.")
    return found


def _truth(classes: Sequence[Sequence[int]], card: ModelCard) -> Sequence[int] | NDArray[np.bool_]:
    """As `compare` takes it: each picture's class; of several labels, bool (N, classes)."""
    if not card.multilabel:
        return [index for (index,) in classes]
    found = np.zeros((len(classes), card.classes), bool)
    for row, of_one in zip(found, classes, strict=True):
        row[list(of_one)] = True
    if not found.any():
        raise UserError(
            f"{LABELS_FILE} gives none of the {len(classes)} pictures to measure on a label. {FORM}"
        )
    return found


def split(
    wanted: LowerPrecision, labels: Sequence[Label], *, multilabel: bool = False
) -> tuple[list[Path], list[Path], dict[Path, tuple[int, ...]] | None]:
    """Pictures to calibrate on, others to measure on, and the latter's classes, if known.

    Of a folder for both, half or more is held back. A picture that is there twice counts once. Of
    several labels a picture a folder's name could tell only one: there a list tells them, and only
    its pictures are measured on.
    """
    known: set[bytes] = set()

    def drawn(folder: Path) -> list[Path]:
        """A folder's pictures, in an order that is random and always the same."""
        found = {}
        for path in _search(folder):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in known:
                known.add(digest)
                found[digest] = path
        return [found[digest] for digest in sorted(found)]

    given = drawn(wanted.calibrate) if wanted.calibrate else []
    count = CALIBRATION_PICTURES
    if wanted.evaluate is not None:
        folder, evaluation = wanted.evaluate, drawn(wanted.evaluate)
    else:
        assert wanted.calibrate is not None
        count = min(count, len(given) // 2)
        folder, evaluation = wanted.calibrate, given[count:]
    classes = _listed(folder, labels) if multilabel else None
    if classes is not None:
        unlisted = [path for path in evaluation if path not in classes]
        if unlisted:
            warn(
                f"{folder / LABELS_FILE} does not name {len(unlisted)} of the pictures, such as "
                f"{unlisted[0]}: they are not measured on."
            )
        evaluation = [path for path in evaluation if path in classes]
    if not evaluation or (wanted.calibrate and not given[:count]):
        raise UserError(
            f"There are too few pictures in {wanted.calibrate or folder}, or the same ones as in "
            f"{folder}."
        )
    evaluation = evaluation[:EVALUATION_PICTURES]
    if not multilabel:
        classes = _classes(evaluation, folder, labels)
    return given[:count], evaluation, classes


def _listed(folder: Path, labels: Sequence[Label]) -> dict[Path, tuple[int, ...]] | None:
    """What each picture shows that the folder's list names; None where it has none."""
    file = folder / LABELS_FILE
    if not file.is_file():
        return None
    said = read_labels(file, folder)
    names = {name for of_one in said.values() for name in of_one}
    meant = match(names, labels, f"as {file} has it", "Call it by id")
    return {path: tuple(meant[name] for name in of_one) for path, of_one in said.items()}


def _classes(
    pictures: Sequence[Path], folder: Path, labels: Sequence[Label]
) -> dict[Path, tuple[int, ...]] | None:
    """The class of each picture where the folder has a folder a class; else None."""
    named = {path: path.relative_to(folder).parts[0] for path in pictures}
    meant = meanings(named.values(), labels)
    strange = sorted(name for name, found in meant.items() if not found)
    if not strange:
        truth = match(meant, labels, "as a folder is called", "Call the folder by id")
        return {path: (truth[name],) for path, name in named.items()}
    if len(strange) < len(meant):
        raise UserError(
            f"Some folders of {folder} are called as classes, but not {', '.join(strange[:5])}. "
            "Name all of them so, or none."
        )
    return None


def _search(folder: Path) -> list[Path]:
    return search(folder, Found())
