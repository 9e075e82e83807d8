"""What lower precision costs: its answers beside float32's, with intervals and a verdict.

Figures alone, made of two arrays of probabilities: nothing is read, run or written here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from scripts.average_precision import average_precisions

CONFIDENCE = 0.95
# So many standard deviations to either side.
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
_TOP = 5

MEAN_AVERAGE_PRECISION = "mean average precision"
# Each is left out once to find how much the mean average precision varies, and Student's factor for
# so many at that confidence.
_GROUPS, _T = 20, 2.093
# On fewer pictures a class's average precision hangs on the place of a single one.
_FEW_OF_A_CLASS = 20
# Numbers of pictures to speak of.
_COUNTS = tuple(step * 10**power for power in range(2, 7) for step in (1, 2, 4, 6, 8))


@dataclass(frozen=True)
class Bounds:
    """What lower precision may cost.

    Attributes:
        max_loss: of top 1 and of top 5, in percentage points, where the classes are known; of the
            mean average precision of a model that gives several labels.
        agreement: share of first labels, 0 to 1, that must be float32's, where they are not; of
            pictures all of whose labels are, of a model that gives several.
    """

    max_loss: float = 0.5
    agreement: float = 0.99


@dataclass(frozen=True)
class Share:
    """A share of pictures with its confidence interval; of a difference of shares -1 to 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})"


@dataclass(frozen=True)
class Comparison:
    """A model in lower precision beside float32, on the same pictures.

    Attributes:
        pictures: how many.
        agreement: share of pictures whose first label is float32's; of models that give several
            labels, all of whose labels are.
        largest_change: of any class's probability, 0 to 1.
        accuracy: "top 1" and "top 5", or "mean average precision" of models that give several
            labels, to float32's and the lower precision's; empty where the pictures' classes are
            not known.
        loss: the same to what is lost, below 0 where something is gained.
        multilabel: whether the models give several labels.
        rarest: on how many pictures the class is that fewest show, of those that any shows; 0 where
            that is not known, or does not matter.
    """

    pictures: int
    agreement: Share
    largest_change: float
    accuracy: dict[str, tuple[Share, Share]]
    loss: dict[str, Share]
    multilabel: bool = False
    rarest: int = 0

    @property
    def compared(self) -> str:
        """What must be float32's."""
        return "labels" if self.multilabel else "first labels"

    def report(self) -> list[str]:
        """A sentence a figure."""
        lines = [
            f"{self.compared} as in float32: {self.agreement} of {self.pictures} pictures",
            (
                f"largest change of a probability: {self.largest_change:.4f}; at most "
                f"{_unseen(self.pictures):.2%} of such pictures change more"
            ),
        ]
        for name, (exact, lower) in self.accuracy.items():
            points = self.loss[name]
            lines.append(
                f"{name}: {exact} in float32, {lower} in lower precision: "
                f"{100 * points.value:.2f} points lost ({100 * points.low:.2f} to "
                f"{100 * points.high:.2f})"
            )
        return lines

    def excess(self, bounds: Bounds) -> str:
        """What is above the bounds; empty where nothing is."""
        if not self.loss:
            if self.agreement.value >= bounds.agreement:
                return ""
            return (
                f"{self.agreement.value:.2%} of the {self.compared} are float32's, "
                f"{bounds.agreement:.2%} must be"
            )
        return ", and ".join(
            f"{name} loses {100 * lost.value:.2f} points, {bounds.max_loss:g} are allowed"
            for name, lost in self.loss.items()
            if 100 * lost.value > bounds.max_loss
        )

    def doubt(self, bounds: Bounds) -> str:
        """Why so few pictures cannot show that the bounds hold; empty where they can."""
        if self.multilabel and self.loss:
            return self._doubt_of_ranks(bounds)
        if self.loss:
            shown = all(100 * lost.high <= bounds.max_loss for lost in self.loss.values())
            # Of pictures that all keep their label, so many would do.
            enough = _enough(lambda n: 100 * lost_of(np.zeros(n, np.int64)).high <= bounds.max_loss)
            bound = f"that less than {bounds.max_loss:g} points are lost"
        else:
            shown = self.agreement.low >= bounds.agreement
            enough = _enough(lambda n: share_of(n, n).low >= bounds.agreement)
            bound = f"that {bounds.agreement:.2%} agree"
        if shown:
            return ""
        so_many = f"it takes {enough} or more, the more the closer it is" if enough else "any are"
        return (
            f"{self.pictures} pictures are too few to be {CONFIDENCE:.0%} sure {bound}: {so_many}"
        )

    def _doubt_of_ranks(self, bounds: Bounds) -> str:
        if 100 * self.loss[MEAN_AVERAGE_PRECISION].high > bounds.max_loss:
            return (
                f"{self.pictures} pictures are too few to be {CONFIDENCE:.0%} sure that less than "
                f"{bounds.max_loss:g} points of the {MEAN_AVERAGE_PRECISION} are lost"
            )
        if self.rarest < _FEW_OF_A_CLASS:
            return (
                f"a class is on {self.rarest} of the {self.pictures} pictures only, too few to "
                f"tell its average precision: give it {_FEW_OF_A_CLASS} or more of each class"
            )
        return ""


def compare(
    exact: NDArray[np.float32],
    lower: NDArray[np.float32],
    truth: Sequence[int] | NDArray[np.bool_] | None = None,
    thresholds: NDArray[np.float32] | None = None,
) -> Comparison:
    """Compares two models' answers to the same pictures.

    Args:
        exact: float32 (N, classes), float32's probabilities.
        lower: the same of the lower precision.
        truth: the right classes' positions, if they are known; of models that give several labels
            bool (N, classes), with a class or more on some picture.
        thresholds: float32 (classes,), of models that give several labels.
    """
    if thresholds is None:
        same = exact.argmax(axis=1) == lower.argmax(axis=1)
    else:
        same = ((exact >= thresholds) == (lower >= thresholds)).all(axis=1)
    agreeing, count = int(same.sum()), len(exact)
    accuracy, loss, rarest = {}, {}, 0
    if truth is not None and thresholds is not None:
        shows = np.asarray(truth, bool)
        *both, loss[MEAN_AVERAGE_PRECISION] = _ranked(exact, lower, shows)
        accuracy[MEAN_AVERAGE_PRECISION] = both[0], both[1]
        rarest = int(shows.sum(axis=0)[shows.any(axis=0)].min())
    elif truth is not None:
        for top in (1, _TOP):
            before, after = (_right(found, np.asarray(truth), top) for found in (exact, lower))
            name = f"top {top}"
            accuracy[name] = share_of(int(before.sum()), count), share_of(int(after.sum()), count)
            loss[name] = lost_of(before.astype(int) - after.astype(int))
    change = float(np.abs(exact - lower).max())
    agreement = share_of(agreeing, count)
    return Comparison(count, agreement, change, accuracy, loss, thresholds is not None, rarest)


def _ranked(
    exact: NDArray[np.float32], lower: NDArray[np.float32], truth: NDArray[np.bool_]
) -> tuple[Share, Share, Share]:
    """Both mean average precisions and what is lost, each with its interval.

    The interval is that of the delete-a-group jackknife: the pictures are measured without each
    twentieth of them in turn. Source: P. S. Kott, "The delete-a-group jackknife", Journal of
    Official Statistics 17 (2001).
    """

    def measured(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        means = [np.nanmean(average_precisions(truth[rows], of[rows])) for of in (exact, lower)]
        return np.array([*means, means[0] - means[1]])

    group = np.arange(len(truth)) % _GROUPS
    parts = [group != left_out for left_out in range(_GROUPS)]
    # Without a label nothing can be ranked.
    found = np.array([measured(rows) for rows in parts if truth[rows].any()])
    values = measured(np.ones(len(truth), bool))
    if len(found) > 1:
        squares = ((found - found.mean(axis=0)) ** 2).sum(axis=0)
        half = _T * np.sqrt(squares * (len(found) - 1) / len(found))
    else:
        half = np.ones(len(values))
    lowest = (0, 0, -1)
    exactly, lowered, lost = (
        Share(float(value), float(max(least, value - by)), float(min(1, value + by)))
        for value, by, least in zip(values, half, lowest, strict=True)
    )
    return exactly, lowered, lost


def _right(
    probabilities: NDArray[np.float32], truth: NDArray[np.int64], top: int
) -> NDArray[np.bool_]:
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    found: NDArray[np.bool_] = (best == truth[:, None]).any(axis=1)
    return found


def share_of(part: int, whole: int) -> Share:
    """A share with Wilson's score interval."""
    share, spread = part / whole, _Z**2 / whole
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / whole + spread / whole / 4)
    return Share(share, (middle - half) / (1 + spread), (middle + half) / (1 + spread))


def lost_of(differences: NDArray[np.int64]) -> Share:
    """The mean of paired differences, each -1, 0 or 1, with Bonett and Price's adjusted interval.

    Source: "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", Journal of Educational and Behavioral Statistics 37 (2012).
    """
    count = len(differences)
    lost, gained = ((int((differences == sign).sum()) + 1) / (count + 2) for sign in (1, -1))
    half = _Z * math.sqrt((lost + gained - (lost - gained) ** 2) / (count + 2))
    middle = lost - gained
    return Share(float(differences.mean()), float(middle - half), float(middle + half))


def _unseen(count: int) -> float:
    """The largest share of pictures of a kind that none of `count` pictures showed."""
    return float(1 - (1 - CONFIDENCE) ** (1 / count))


def _enough(holds: Callable[[int], bool]) -> int | None:
    """About how many pictures it takes for something to hold; None where it never does."""
    return next((count for count in _COUNTS if holds(count)), None)
