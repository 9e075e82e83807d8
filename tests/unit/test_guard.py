"""What lower precision may cost, and what so many pictures can show of it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score

from scripts.build.guard import Bounds, compare, lost_of, share_of

CLASSES = 10


def answers(count: int, wrong: int = 0) -> NDArray[np.float32]:
    """Probabilities whose best class is 3, but for the first `wrong` pictures, where it is 4."""
    found = np.full((count, CLASSES), 0.05, np.float32)
    found[:, 3] = 0.55
    found[:wrong, [3, 4]] = found[:wrong, [4, 3]]
    return found


@pytest.mark.parametrize(("part", "whole"), [(0, 10), (7, 10), (99, 100), (400, 400)])
def test_intervals_of_shares_are_wilson_s(part: int, whole: int) -> None:
    expected = binomtest(part, whole).proportion_ci(method="wilson")
    found = share_of(part, whole)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_a_loss_holds_it_as_often_as_it_says() -> None:
    """Drawn anew 2,000 times: 3 % of 400 pictures lost, 1 % gained."""
    random = np.random.default_rng(0)
    drawn = random.choice([1, -1, 0], p=[0.03, 0.01, 0.96], size=(2000, 400))
    found = [lost_of(row) for row in drawn]
    held = np.mean([share.low <= 0.02 <= share.high for share in found])
    assert 0.94 <= held <= 0.99


def test_without_classes_the_agreement_decides() -> None:
    found = compare(answers(1000), answers(1000, wrong=11))
    assert found.agreement.value == pytest.approx(0.989)
    assert found.largest_change == pytest.approx(0.5)
    assert found.excess(Bounds()) == "98.90% of the first labels are float32's, 99.00% must be"
    assert found.excess(Bounds(agreement=0.98)) == ""


def test_with_classes_the_loss_decides_and_what_is_gained_counts() -> None:
    truth = [3] * 1000
    lost = compare(answers(1000), answers(1000, wrong=6), truth)
    assert lost.excess(Bounds()) == "top 1 loses 0.60 points, 0.5 are allowed"
    assert lost.loss["top 5"].value == 0
    assert lost.excess(Bounds(max_loss=1)) == ""
    gained = compare(answers(1000, wrong=6), answers(1000), truth)
    assert gained.loss["top 1"].value == pytest.approx(-0.006)
    assert gained.excess(Bounds()) == ""


def test_too_few_pictures_are_said_and_enough_are_not() -> None:
    few = compare(answers(100), answers(100))
    assert "100 pictures are too few to be 95% sure that 99.00% agree" in few.doubt(Bounds())
    assert "it takes 400 or more" in few.doubt(Bounds())
    assert compare(answers(400), answers(400)).doubt(Bounds()) == ""
    assert "100.00% agree: any are" in compare(answers(400), answers(400)).doubt(
        Bounds(agreement=1)
    )
    known = compare(answers(400), answers(400), [3] * 400)
    assert "that less than 0.5 points are lost: it takes 600 or more" in known.doubt(Bounds())
    assert compare(answers(600), answers(600), [3] * 600).doubt(Bounds()) == ""


def test_the_report_has_every_figure_with_its_interval() -> None:
    lines = compare(answers(1000), answers(1000, wrong=6), [3] * 1000).report()
    assert lines[0] == "first labels as in float32: 99.40% (98.70% to 99.72%) of 1000 pictures"
    assert lines[1].startswith("largest change of a probability: 0.5000; at most 0.30% of such")
    assert "0.60 points lost (0.05 to 1.15)" in lines[2]
    assert lines[3].startswith("top 5: 100.00%")


# --- Several labels ---

THRESHOLDS = np.full(3, 0.5, np.float32)


def ranked(count: int, noise: float, seed: int = 0) -> tuple[Any, Any, Any]:
    """Probabilities of three classes, the same with noise, and what each picture shows."""
    random = np.random.default_rng(seed)
    truth = random.random((count, 3)) < 0.3
    exact = (truth + random.normal(0, 0.5, truth.shape)).astype(np.float32)
    return exact, (exact + random.normal(0, noise, truth.shape)).astype(np.float32), truth


def test_of_several_labels_the_mean_average_precision_decides() -> None:
    exact, lower, truth = ranked(400, 0.4)
    found = compare(exact, lower, truth, THRESHOLDS)
    name = "mean average precision"
    assert list(found.loss) == [name]
    for share, of in zip(found.accuracy[name], (exact, lower), strict=True):
        assert share.value == pytest.approx(average_precision_score(truth, of))
    lost = found.loss[name]
    assert lost.value == pytest.approx(
        found.accuracy[name][0].value - found.accuracy[name][1].value
    )
    assert found.excess(Bounds()) == f"{name} loses {100 * lost.value:.2f} points, 0.5 are allowed"
    assert found.excess(Bounds(max_loss=50)) == ""
    assert f"{100 * lost.value:.2f} points lost ({100 * lost.low:.2f} to" in found.report()[2]
    gained = compare(lower, exact, truth, THRESHOLDS)
    assert gained.excess(Bounds()) == ""


def test_the_interval_of_what_ranks_lose_holds_it() -> None:
    """Drawn anew ten times; what is lost on very many pictures is what there is to find."""
    exact, lower, truth = ranked(50_000, 0.4, seed=1)
    value = average_precision_score(truth, exact) - average_precision_score(truth, lower)
    drawn = [ranked(200, 0.4, seed) for seed in range(10)]
    found = [compare(a, b, of_both, THRESHOLDS) for a, b, of_both in drawn]
    lost = [comparison.loss["mean average precision"] for comparison in found]
    assert sum(share.low <= value <= share.high for share in lost) >= 8
    # Wide enough is not all: it is not wide without bounds.
    assert all(share.high - share.low < 0.2 for share in lost)


def test_too_few_pictures_of_several_labels_are_said() -> None:
    exact, lower, truth = ranked(100, 0.01)
    doubt = compare(exact, lower, truth, THRESHOLDS).doubt(Bounds(max_loss=0.05))
    assert "100 pictures are too few to be 95% sure that less than 0.05 points of the mean" in doubt
    truth[:, 2] = np.arange(100) < 3  # and one class that three pictures show
    same = compare(exact, exact, truth, THRESHOLDS)
    assert same.doubt(Bounds()).startswith("a class is on 3 of the 100 pictures only")
    truth[:, 2] = False
    assert compare(exact, exact, truth, THRESHOLDS).doubt(Bounds()) == ""
