"""Compare a model in reduced precision with float32: differences, intervals and a verdict.

Pure functions of two arrays of probabilities: nothing is read, run or written here.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Rounding to bf16 changed probabilities of a trained EfficientNet-Lite0 by up to 0.096 on 300
# images; in all 12 images with another top-1 prediction, float32's two best were within 0.065.
NEAR_TIE_MARGIN = 0.1
# A multi-label model's threshold does not move, only the probability does: half of that.
NEAR_THRESHOLD = NEAR_TIE_MARGIN / 2
# With fewer, a single image is more than 5 percentage points.
MIN_CLEAR_IMAGES = 20

_TOP = 5
# For the standard error of a loss of mean average precision. Each takes 3 ms per class at 4,000
# images; Student's t accounts for their small number.
_RESAMPLES = 30
# With fewer images, a class's average precision depends on the rank of a single one.
_MIN_IMAGES_PER_CLASS = 20
# Numbers of images to recommend.
_COUNTS = tuple(step * 10**power for power in range(1, 7) for step in (1, 2, 4, 6, 8))

Probabilities = NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """What reduced precision may cost.

    Attributes:
        max_loss: percentage points of top-1 and top-5 accuracy or of mean average precision, if the
            images' classes are known.
        agreement: share, 0 to 1, of the images without near ties that must get float32's
            prediction, if the classes are not known.
    """

    max_loss: float = 0.5
    agreement: float = 0.99


@dataclass(frozen=True)
class Share:
    """A share of images."""

    part: int
    whole: int

    def interval(self) -> tuple[float, float]:
        """Return Wilson's interval, 0 to 1."""
        from scipy.stats import binomtest  # of the evaluation group

        ends = binomtest(self.part, self.whole).proportion_ci(CONFIDENCE, "wilson")
        return float(ends.low), float(ends.high)

    def __str__(self) -> str:
        if not self.whole:
            return "0 images"
        low, high = self.interval()
        share = f"{self.part / self.whole:.2%} ({low:.2%} to {high:.2%})"
        return f"{self.part} of {self.whole} images, {share}"


@dataclass(frozen=True)
class Loss:
    """A loss of accuracy; `before` and `after` are 0 to 1, `interval` is in percentage points."""

    name: str
    before: float
    after: float
    interval: tuple[float, float]

    @property
    def points(self) -> float:
        """Return the loss in percentage points, negative for a gain."""
        return round(100 * (self.before - self.after), 9)  # 1 of 200 images is 0.5 exactly

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.name}: {self.before:.2%} in float32, {self.after:.2%} in reduced precision, a "
            f"loss of {self.points:.2f} percentage points ({low:.2f} to {high:.2f})"
        )


@dataclass(frozen=True)
class Comparison:
    """The answers of a model in reduced precision and in float32 to the same images.

    Attributes:
        answer: what is compared, "top-1 prediction" or a multi-label model's "labels".
        same: images with the same answer.
        clear: the same among the images that are not near ties in float32.
        largest_change: of any class's probability, 0 to 1.
        losses: empty if the images' classes are not known.
        rarest: images of the rarest class, if the loss is one of mean average precision.
    """

    answer: str
    same: Share
    clear: Share
    largest_change: float
    losses: tuple[Loss, ...] = ()
    rarest: int | None = None

    def report(self) -> list[str]:
        """Return a line per figure, with intervals of 95 % confidence."""
        different = self.same.whole - self.same.part
        near = different - (self.clear.whole - self.clear.part)
        ties = f"; {near} of the {different} that differ are near ties" if different else ""
        return [
            f"same {self.answer} as float32: {self.same}{ties}",
            f"without near ties: {self.clear}",
            f"largest change of a probability: {self.largest_change:.4f}",
            *(f"{loss}, on {self.same.whole} images" for loss in self.losses),
        ]

    def excess(self, limits: Limits) -> str:
        """Return what exceeds the limits; empty if nothing does."""
        if not self.losses:
            if self.clear.part >= round(limits.agreement * self.clear.whole, 9):
                return ""
            return (
                f"{self.clear}, that are not near ties get float32's {self.answer}, and the limit "
                f"is {limits.agreement:.2%}"
            )
        found = []
        for loss in (loss for loss in self.losses if loss.points > limits.max_loss):
            images = f"{round(loss.points * self.same.whole / 100)} of {self.same.whole} images"
            counted = f" ({images})" if self.rarest is None else ""
            found.append(f"{loss.name} loses {loss.points:.2f} percentage points{counted}")
        return f"{' and '.join(found)}, and the limit is {limits.max_loss:g}" if found else ""

    def doubt(self, limits: Limits) -> str:
        """Return why the images do not show that the limits hold; empty if they do."""
        if self.losses:
            count = self.same.whole
            claim = f"less than {limits.max_loss:g} percentage points are lost"
            shown = all(loss.interval[1] <= limits.max_loss for loss in self.losses)
            enough = (n for n in _COUNTS if paired_interval(0, 0, n)[1] <= limits.max_loss)
        else:
            count, claim = self.clear.whole, f"{limits.agreement:.2%} agree"
            shown = not count or self.clear.interval()[0] >= limits.agreement
            enough = (n for n in _COUNTS if Share(n, n).interval()[0] >= limits.agreement)
        if not shown:
            needed = next(enough, 0) if self.rarest is None else 0
            why = "the result is too close to the limit, and only more images can tell"
            if needed > count:
                why = f"it takes {needed} or more, even if nothing changes"
            return f"{count} images are not enough to be {CONFIDENCE:.0%} sure that {claim}: {why}"
        if self.rarest is not None and self.rarest < _MIN_IMAGES_PER_CLASS:
            return (
                f"a class is in {self.rarest} of {count} images, too few to measure its average "
                f"precision: use {_MIN_IMAGES_PER_CLASS} or more of each class"
            )
        return ""


def margins(exact: Probabilities, thresholds: Probabilities | None = None) -> Probabilities:
    """Return float32 (N,): the difference of the two best classes or, of multi-label models, the
    smallest distance of a class from its threshold.
    """
    best = np.sort(exact, axis=1)
    result: Probabilities = best[:, -1] - best[:, -2]
    return result if thresholds is None else np.abs(exact - thresholds).min(axis=1)


def near_ties(exact: Probabilities, thresholds: Probabilities | None = None) -> NDArray[np.bool_]:
    """Return bool (N,): images whose prediction a small change of a probability can change."""
    limit = NEAR_TIE_MARGIN if thresholds is None else NEAR_THRESHOLD
    return margins(exact, thresholds) < limit


def compare(
    exact: Probabilities,
    reduced: Probabilities,
    truth: NDArray[np.bool_] | None = None,
    thresholds: Probabilities | None = None,
) -> Comparison:
    """Compare two models' answers to the same images.

    Args:
        exact: float32 (N, classes), the probabilities in float32.
        reduced: the same in reduced precision.
        truth: bool (N, classes), what each image shows, if known; some image shows a class.
        thresholds: float32 (classes,), of multi-label models.
    """
    losses, rarest = [], None
    if thresholds is not None:
        answer, same = "labels", ((exact >= thresholds) == (reduced >= thresholds)).all(axis=1)
        if truth is not None:
            losses = [_rank_loss(exact, reduced, truth)]
            rarest = int(truth.sum(axis=0)[truth.any(axis=0)].min())
    else:
        answer, same = "top-1 prediction", exact.argmax(axis=1) == reduced.argmax(axis=1)
        if truth is not None:
            tops = [top for top in (1, _TOP) if top < exact.shape[1]]
            losses = [_top_loss(exact, reduced, truth.argmax(axis=1), top) for top in tops]
    clear = ~near_ties(exact, thresholds)
    all_of, clear_of = (Share(int(of.sum()), len(of)) for of in (same, same[clear]))
    change = float(np.abs(exact - reduced).max())
    return Comparison(answer, all_of, clear_of, change, tuple(losses), rarest)


def _top_loss(
    exact: Probabilities, reduced: Probabilities, truth: NDArray[np.int64], top: int
) -> Loss:
    before, after = (
        (np.argsort(-of, axis=1, kind="stable")[:, :top] == truth[:, None]).any(axis=1)
        for of in (exact, reduced)
    )
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    interval = paired_interval(lost, gained, len(truth))
    return Loss(f"top-{top} accuracy", float(before.mean()), float(after.mean()), interval)


def paired_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """Return an interval for the loss of accuracy on the same images, in percentage points.

    SciPy has none for paired shares. Source: Bonett and Price, "Adjusted Wald confidence interval
    for a difference of binomial proportions based on paired data", Journal of Educational and
    Behavioral Statistics 37 (2012).
    """
    from scipy.stats import norm

    before, after = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    error = math.sqrt((before + after - (before - after) ** 2) / (count + 2))
    low, high = norm.interval(CONFIDENCE, before - after, error)
    return 100 * float(low), 100 * float(high)


def _rank_loss(exact: Probabilities, reduced: Probabilities, truth: NDArray[np.bool_]) -> Loss:
    """Return the loss of mean average precision, with an interval by the bootstrap over images."""
    from scipy.stats import bootstrap, t
    from sklearn.metrics import average_precision_score

    def mean(of: Probabilities, rows: NDArray[np.int64]) -> float:
        shown = truth[rows].any(axis=0)  # of the others there is nothing to rank
        if not shown.any():
            return 0.0
        return float(average_precision_score(truth[rows][:, shown], of[rows][:, shown]))

    rows = np.arange(len(truth))
    before, after = mean(exact, rows), mean(reduced, rows)
    error = bootstrap(
        [rows],
        lambda drawn: mean(exact, drawn) - mean(reduced, drawn),
        n_resamples=_RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=0,
    ).standard_error
    half = float(t.ppf((1 + CONFIDENCE) / 2, _RESAMPLES - 1) * error)
    ends = 100 * (before - after - half), 100 * (before - after + half)
    return Loss("mean average precision", before, after, ends)
