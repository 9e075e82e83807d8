"""What reduced precision costs, and what a number of images can show of it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score

from scripts.build.guard import Limits, Share, compare, near_ties, paired_interval

CLASSES = 10


def answers(count: int, wrong: int = 0, ties: int = 0) -> NDArray[np.float32]:
    """Return probabilities whose best class is 3, but for the first `wrong` images, where it is 4.

    Of the first `ties` images, the second class is 0.02 behind the best.
    """
    found = np.full((count, CLASSES), 0.05, np.float32)
    found[:, 3] = 0.55
    found[:ties, [3, 4]] = 0.31, 0.29
    found[:wrong, [3, 4]] = found[:wrong, [4, 3]]
    return found


def of_class_3(count: int) -> NDArray[np.bool_]:
    return np.tile(np.arange(CLASSES) == 3, (count, 1))


def test_the_interval_of_a_loss_covers_it_with_the_stated_confidence() -> None:
    """Of 2,000 draws of 400 images, each lost with 3 % and gained with 1 %."""
    random = np.random.default_rng(0)
    drawn = random.multinomial(400, [0.03, 0.01, 0.96], 2000)
    found = [paired_interval(lost, gained, 400) for lost, gained, _ in drawn]
    coverage = np.mean([low <= 2 <= high for low, high in found])
    assert 0.94 <= coverage <= 0.99


def test_without_classes_agreement_on_images_that_are_not_near_ties_decides() -> None:
    """As bf16 does to an ImageNet model: only near ties get another prediction."""
    found = compare(answers(150, ties=30), answers(150, wrong=2, ties=30))
    assert found.excess(Limits()) == ""
    lines = found.report()
    interval = binomtest(148, 150).proportion_ci(method="wilson")
    ends = f"{interval.low:.2%} to {interval.high:.2%}"
    assert lines[0] == (
        f"same top-1 prediction as float32: 148 of 150 images, 98.67% ({ends}); 2 of the 2 that "
        "differ are near ties"
    )
    assert lines[1].startswith("without near ties: 120 of 120 images, 100.00% (96.")
    assert lines[2] == "largest change of a probability: 0.0200"
    worse = compare(answers(150, ties=30), answers(150, wrong=32, ties=30))
    assert "30 of the 32 that differ" in worse.report()[0]
    assert worse.excess(Limits()).startswith("118 of 120 images, 98.33% (")
    assert worse.excess(Limits()).endswith(
        "get float32's top-1 prediction, and the limit is 99.00%"
    )
    assert worse.excess(Limits(agreement=0.98)) == ""
    assert near_ties(answers(2, ties=1)).tolist() == [True, False]


def test_with_classes_the_loss_decides_and_gains_count() -> None:
    truth = of_class_3(1000)
    lost = compare(answers(1000), answers(1000, wrong=6), truth)
    expected = (
        "top-1 accuracy loses 0.60 percentage points (6 of 1000 images), and the limit is 0.5"
    )
    assert lost.excess(Limits()) == expected
    assert lost.losses[1].points == 0
    assert lost.excess(Limits(max_loss=1)) == ""
    assert lost.report()[3] == (
        "top-1 accuracy: 100.00% in float32, 99.40% in reduced precision, a loss of 0.60 "
        "percentage points (0.05 to 1.15), on 1000 images"
    )
    assert lost.report()[4].startswith("top-5 accuracy: 100.00%")
    gained = compare(answers(1000, wrong=6), answers(1000), truth)
    assert gained.losses[0].points == pytest.approx(-0.6)
    assert gained.excess(Limits()) == ""


def test_a_loss_of_one_image_is_counted_and_one_at_the_limit_is_accepted() -> None:
    one = compare(answers(150), answers(150, wrong=1), of_class_3(150))
    assert "loses 0.67 percentage points (1 of 150 images)" in one.excess(Limits())
    assert compare(answers(200), answers(200, wrong=1), of_class_3(200)).excess(Limits()) == ""
    assert compare(answers(100), answers(100, wrong=1)).excess(Limits()) == ""


def test_few_images_give_a_doubt_with_the_number_that_it_takes() -> None:
    doubt = compare(answers(100), answers(100)).doubt(Limits())
    assert doubt.startswith(
        "100 images are not enough to be 95% sure that 99.00% agree: it takes 400"
    )
    assert compare(answers(400), answers(400)).doubt(Limits()) == ""
    known = compare(answers(400), answers(400), of_class_3(400)).doubt(Limits())
    assert "that less than 0.5 percentage points are lost: it takes 600 or more" in known
    assert compare(answers(600), answers(600), of_class_3(600)).doubt(Limits()) == ""


@pytest.mark.parametrize(("wrong", "limit"), [(20, 0.85), (0, 1.0)])
def test_if_there_are_enough_images_the_result_is_too_close_to_the_limit(
    wrong: int, limit: float
) -> None:
    found = compare(answers(150), answers(150, wrong=wrong))
    assert found.excess(Limits(agreement=limit)) == ""
    doubt = found.doubt(Limits(agreement=limit))
    assert "too close to the limit" in doubt
    assert "it takes" not in doubt


def test_no_image_is_no_share_and_no_doubt() -> None:
    found = compare(answers(9, ties=9), answers(9, ties=9))
    assert (found.clear, str(found.clear)) == (Share(0, 0), "0 images")
    assert found.excess(Limits(agreement=0)) + found.doubt(Limits(agreement=0)) == ""


# --- Multi-label models ---

THRESHOLDS = np.full(3, 0.5, np.float32)


def ranked(count: int, noise: float, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return probabilities of three classes, the same with noise, and what each image shows."""
    random = np.random.default_rng(seed)
    truth = random.random((count, 3)) < 0.3
    exact = (truth + random.normal(0, 0.5, truth.shape)).astype(np.float32)
    return exact, (exact + random.normal(0, noise, truth.shape)).astype(np.float32), truth


def test_for_multi_label_models_the_mean_average_precision_decides() -> None:
    exact, reduced, truth = ranked(400, 0.4)
    found = compare(exact, reduced, truth, THRESHOLDS)
    (loss,) = found.losses
    assert loss.before == pytest.approx(average_precision_score(truth, exact))
    assert loss.after == pytest.approx(average_precision_score(truth, reduced))
    expected = (
        f"mean average precision loses {loss.points:.2f} percentage points, and the limit is "
    )
    assert found.excess(Limits()) == f"{expected}0.5"
    assert found.excess(Limits(max_loss=50)) == ""
    assert compare(reduced, exact, truth, THRESHOLDS).excess(Limits()) == ""
    assert found == compare(exact, reduced, truth, THRESHOLDS)


def test_the_interval_of_a_loss_of_mean_average_precision_covers_it() -> None:
    """Of ten draws; the loss on very many images is the one to find."""
    exact, reduced, truth = ranked(50_000, 0.4, seed=1)
    value = average_precision_score(truth, exact) - average_precision_score(truth, reduced)
    drawn = [ranked(200, 0.4, seed) for seed in range(10)]
    losses = [compare(a, b, of_both, THRESHOLDS).losses[0] for a, b, of_both in drawn]
    assert sum(loss.interval[0] <= 100 * value <= loss.interval[1] for loss in losses) >= 8
    # Not by being very wide.
    assert all(loss.interval[1] - loss.interval[0] < 20 for loss in losses)


def test_images_near_any_threshold_are_near_ties() -> None:
    exact = np.array([[0.9, 0.1, 0.46], [0.9, 0.1, 0.44], [0.54, 0.1, 0.9]], np.float32)
    assert near_ties(exact, THRESHOLDS).tolist() == [True, False, True]
    found = compare(exact, exact[:, ::-1], None, THRESHOLDS)
    assert (found.same, found.clear) == (Share(1, 3), Share(0, 1))
    assert "float32's labels" in found.excess(Limits())


def test_too_few_images_of_a_class_give_a_doubt() -> None:
    exact, reduced, truth = ranked(100, 0.01)
    doubt = compare(exact, reduced, truth, THRESHOLDS).doubt(Limits(max_loss=0.05))
    assert "0.05 percentage points are lost: the result is too close to the limit" in doubt
    truth[:, 2] = np.arange(100) < 3  # a class that three images show
    same = compare(exact, exact, truth, THRESHOLDS)
    assert same.doubt(Limits()).startswith("a class is in 3 of 100 images, too few")
    truth[:, 2] = False
    assert compare(exact, exact, truth, THRESHOLDS).doubt(Limits()) == ""
