"""The intervals against naive resampling, row by row, with scikit-learn's scores."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics

from pipeline.bootstrap import BLOCK, Balanced, Floats, Gaps, Ranked, Ratios, draw, interval, pivotal_interval, resample
from pipeline.calibration import BINS, find_bins, reliability

PATIENTS = 25


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, a probability with many ties, and whose row it is: 1 to 12 rows a patient, alike within a patient."""
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(PATIENTS), rng.integers(1, 13, PATIENTS))
    truth = rng.random(len(patient)) < np.where(np.arange(PATIENTS) % 3 == 0, 0.6, 0.02)[patient]
    leaning = rng.normal(0, 0.1, PATIENTS)[patient]
    return truth, np.round(np.clip(0.3 + leaning + 0.25 * truth + rng.normal(0, 0.15, len(patient)), 0, 1), 2), patient


def naive(rows: tuple[np.ndarray, np.ndarray, np.ndarray], counts_P: Floats) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a resample, each as often as its patient was drawn."""
    truth, probability, patient = rows
    taken = np.repeat(np.arange(len(patient)), counts_P[patient].astype(int))
    return truth[taken], probability[taken]


def test_every_draw_equals_scikit_learn_on_the_repeated_rows(rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    truth, probability, patient = rows
    called = probability >= 0.45
    parts = {
        "sensitivity": (truth & called, truth),
        "ppv": (truth & called, called),
        "f1": (2 * (truth & called), truth.astype(int) + called),
        "brier": ((probability - truth) ** 2, np.ones(len(truth))),
    }
    statistics = {
        "ranks": Ranked(truth, probability, patient_N=patient),
        "sums": Ratios(parts, patient_N=patient, patients=PATIENTS),
    }
    drawn = resample(statistics, patients=PATIENTS, resamples=130, seed=5)
    counts = np.concatenate(list(draw(PATIENTS, resamples=130, seed=5)))
    assert len(counts) == 130 > 2 * BLOCK
    for number, counts_P in enumerate(counts):
        known, said = naive(rows, counts_P)
        expected = {
            "auc": sklearn.metrics.roc_auc_score(known, said),
            "average_precision": sklearn.metrics.average_precision_score(known, said),
            "sensitivity": sklearn.metrics.recall_score(known, said >= 0.45),
            "ppv": sklearn.metrics.precision_score(known, said >= 0.45),
            "f1": sklearn.metrics.f1_score(known, said >= 0.45),
            "brier": sklearn.metrics.brier_score_loss(known, said),
        }
        found = {name: values[number] for of in drawn.values() for name, values in of.items()}
        assert found == pytest.approx(expected, abs=1e-12)


def test_interval_is_that_of_naive_resampling_of_patients_with_another_generator(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    truth, probability, patient = rows
    drawn = resample(
        {"ranks": Ranked(truth, probability, patient_N=patient)}, patients=PATIENTS, resamples=4000, seed=0
    )
    rng, aucs = np.random.RandomState(99), []
    of_patient = [np.flatnonzero(patient == one) for one in range(PATIENTS)]
    while len(aucs) < 1500:
        taken = np.concatenate([of_patient[one] for one in rng.choice(PATIENTS, PATIENTS)])
        aucs.append(sklearn.metrics.roc_auc_score(truth[taken], probability[taken]))
    expected = np.percentile(aucs, [2.5, 97.5])
    assert interval(drawn["ranks"]["auc"]) == pytest.approx(expected, abs=0.1 * np.ptp(expected))


def test_patients_are_resampled_and_not_rows() -> None:
    """Ten rows a patient that are all alike hold no more than one does: the interval stays as wide."""
    rng = np.random.default_rng(0)
    truth = rng.random(60) < 0.4
    score = truth + rng.normal(0, 1, 60)
    once = Ranked(truth, score, patient_N=np.arange(60))
    tenfold = Ranked(np.repeat(truth, 10), np.repeat(score, 10), patient_N=np.repeat(np.arange(60), 10))
    drawn = resample({"once": once, "tenfold": tenfold}, patients=60, resamples=300, seed=1)
    np.testing.assert_allclose(drawn["once"]["auc"], drawn["tenfold"]["auc"], atol=1e-12)


def test_interval_of_a_mean_is_that_of_the_formula() -> None:
    """With one row a patient, the mean's standard error is known."""
    values = np.random.default_rng(0).exponential(1, 900)
    ratios = Ratios({"mean": (values, np.ones(900))}, patient_N=np.arange(900), patients=900)
    low, high = interval(resample({0: ratios}, patients=900, resamples=4000, seed=0)[0]["mean"]) or (0, 0)
    error = values.std() / np.sqrt(900)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_promise() -> None:
    """200 cohorts of 80 patients with 5 like-minded slices each; the AUC of endlessly many patients is known."""
    rng, covered = np.random.default_rng(7), 0
    patient = np.repeat(np.arange(80), 5)
    for _ in range(200):
        truth = (np.arange(80) % 2 == 0)[patient]
        score = truth + rng.normal(0, 1, 80)[patient]  # Φ(1 / √2) = 0.7602
        drawn = resample({0: Ranked(truth, score, patient_N=patient)}, patients=80, resamples=200, seed=0)
        low, high = interval(drawn[0]["auc"]) or (0, 0)
        covered += low <= 0.7602 <= high
    assert 0.89 <= covered / 200 <= 0.985


def test_draws_are_those_of_the_seed_whatever_else_is_drawn() -> None:
    one, same, other = (np.concatenate(list(draw(9, resamples=120, seed=seed))) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    assert (one.sum(axis=1) == 9).all()


def test_draws_without_a_class_count_as_undefined_without_a_warning() -> None:
    truth, score, patient = np.array([True, False, False]), np.array([0.9, 0.1, 0.2]), np.array([0, 1, 2])
    statistics = {
        "ranks": Ranked(truth, score, patient_N=patient),
        "sums": Ratios({"sensitivity": (truth, truth)}, patient_N=patient, patients=3),
    }
    drawn = resample(statistics, patients=3, resamples=400, seed=0)
    lacking = np.isnan(drawn["sums"]["sensitivity"])
    assert lacking.mean() == pytest.approx((2 / 3) ** 3, abs=0.08)
    assert interval(drawn["sums"]["sensitivity"]) is None, "one positive patient is too few"
    assert interval(drawn["ranks"]["auc"]) is None
    assert np.isnan(drawn["ranks"]["average_precision"][lacking]).all()


def test_interval_leaves_out_the_few_draws_that_lack_the_figure() -> None:
    values = np.linspace(0, 1, 1001)
    assert interval(np.append(values, [np.nan] * 20)) == pytest.approx([0.025, 0.975])
    assert interval(np.append(values, [np.nan] * 120)) is None


@pytest.mark.parametrize(("positive", "enough"), [(2, False), (3, True)])
@pytest.mark.parametrize("patients", [20, 2000])
def test_three_positive_patients_are_enough_for_an_interval_and_two_are_not(
    positive: int, enough: bool, patients: int
) -> None:
    for seed in range(3):
        truth = np.arange(patients) < positive
        score = np.random.default_rng(seed).random(patients)
        ranks = {0: Ranked(truth, score, patient_N=np.arange(patients))}
        drawn = resample(ranks, patients=patients, resamples=1000, seed=seed)
        assert (interval(drawn[0]["auc"]) is not None) == enough


def test_interval_without_width_is_none_for_it_would_promise_certainty() -> None:
    assert interval(np.ones(1000)) is None
    assert interval(np.full(1000, np.nan)) is None


def test_interval_of_a_calibration_error_holds_it_where_the_middle_of_the_draws_does_not() -> None:
    """150 cohorts of 80 patients with 5 slices each, of whom 0.05 more are positive than was said in each bin."""
    rng, held, middle = np.random.default_rng(2), 0, 0
    patient = np.repeat(np.arange(80), 5)
    for _ in range(150):
        probability = rng.choice((np.arange(BINS) + 0.5)[:-1] / BINS, len(patient))
        truth = rng.random(len(patient)) < probability + 0.05
        gaps = Gaps({"ece": (truth - probability, find_bins(probability))}, patient_N=patient, patients=80)
        drawn = resample({0: gaps}, patients=80, resamples=200, seed=0)[0]["ece"]
        low, high = pivotal_interval(drawn, reliability(truth, probability).error or 0) or (1, 0)
        held += low <= 0.05 <= high
        low, high = interval(drawn) or (1, 0)
        middle += low <= 0.05 <= high
    assert held / 150 > 0.85, (held, middle)
    assert middle / 150 < 0.3, (held, middle)


def test_calibration_error_that_chance_alone_explains_has_no_interval() -> None:
    assert pivotal_interval(np.linspace(0.03, 0.08, 100), 0.01) is None
    low, high = pivotal_interval(np.linspace(0.03, 0.08, 1001), 0.04) or (0, 0)
    assert (low, high) == pytest.approx((0.08 - 0.07875, 0.08 - 0.03125))


def test_balanced_auc_of_every_draw_equals_scikit_learns_with_weights(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    truth, probability, patient = rows
    bins = np.random.default_rng(0).integers(0, 4, len(truth))
    balanced = Balanced(truth, probability, bin_N=bins, patient_N=patient)
    drawn = resample({0: balanced}, patients=PATIENTS, resamples=60, seed=5)[0]["auc"]
    for counts_P, found in zip(np.concatenate(list(draw(PATIENTS, resamples=60, seed=5))), drawn, strict=True):
        times = counts_P[patient]
        weight = np.zeros(len(truth))
        for one in range(4):  # in each bin both classes weigh the same, and more the more of both there are
            positive, negative = times[truth & (bins == one)].sum(), times[~truth & (bins == one)].sum()
            here = bins == one
            weight[here] = (np.where(truth, negative, positive) * times / max(positive + negative, 1))[here]
            assert weight[here & truth].sum() == pytest.approx(weight[here & ~truth].sum())
        expected = sklearn.metrics.roc_auc_score(truth, probability, sample_weight=weight)
        assert found == pytest.approx(expected, abs=1e-12)


def test_draw_in_which_no_bin_has_both_classes_has_no_balanced_auc() -> None:
    truth, patient = np.array([True, False, True, False]), np.arange(4)
    balanced = Balanced(truth, np.array([0.9, 0.1, 0.8, 0.2]), bin_N=np.array([0, 0, 1, 1]), patient_N=patient)
    found = balanced.of(np.array([[1.0, 0, 0, 1], [1, 1, 0, 0], [2, 0, 1, 1]]))["auc"]
    assert np.isnan(found[0])
    assert found[1:].tolist() == [1.0, 1.0]
