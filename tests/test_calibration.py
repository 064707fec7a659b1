"""Reliability and temperature scaling against scikit-learn's, and that scaling mends what it is meant to mend."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from pipeline.calibration import BINS, TEMPERATURES, fit_temperature, reliability, scale, to_logit


def drawn(rows: int = 4000, *, temperature: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth, and probabilities that are too sure by so much: the true log odds times the temperature."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1, 1.5, rows)
    return rng.random(rows) < 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-odds * temperature))


def test_bins_equal_scikit_learns_calibration_curve() -> None:
    truth, probability = drawn()
    probability[:3] = [0.0, 1.0, 0.2]  # an edge
    bins = reliability(truth, probability)
    observed, predicted = calibration_curve(truth, probability, n_bins=BINS, strategy="uniform")
    np.testing.assert_allclose(bins.observed, observed)
    np.testing.assert_allclose(bins.predicted, predicted)
    assert bins.rows.sum() == len(truth)


def test_expected_error_is_the_mean_gap_weighted_by_rows() -> None:
    probability, truth = np.array([0.01, 0.03, 0.5, 0.52]), np.array([False, True, True, True])
    assert reliability(truth, probability).error == pytest.approx(0.5 * abs(0.5 - 0.02) + 0.5 * abs(1 - 0.51))
    assert reliability(np.zeros(0, bool), np.zeros(0)).error is None


def test_temperature_equals_scikit_learns_logistic_slope_on_platts_targets() -> None:
    truth, probability = drawn(500, temperature=2.5)
    positives, negatives = truth.sum(), (~truth).sum()
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    logit = to_logit(probability)[:, None]
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.vstack([logit, logit]), np.repeat([1, 0], 500), sample_weight=np.concatenate([target, 1 - target]))
    assert fit_temperature(truth, probability) == pytest.approx(1 / model.coef_[0, 0], rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_scaling_undoes_too_much_and_too_little_certainty(temperature: float) -> None:
    truth, probability = drawn(20_000, temperature=temperature)
    found = fit_temperature(truth, probability)
    assert found == pytest.approx(temperature, rel=0.06)
    fresh, said = drawn(20_000, temperature=temperature, seed=1)
    after = scale(said, found)
    assert (reliability(fresh, after).error or 1) < 0.02
    if temperature != 1:
        assert (reliability(fresh, after).error or 1) < 0.3 * (reliability(fresh, said).error or 0)
        assert sklearn.metrics.log_loss(fresh, after) < sklearn.metrics.log_loss(fresh, said)


def test_scaling_keeps_the_order_and_temperature_one_changes_nothing() -> None:
    _, probability = drawn(300)
    assert (np.argsort(scale(probability, 2.7)) == np.argsort(probability)).all()
    np.testing.assert_allclose(scale(probability, 1.0), probability, atol=1e-9)


def test_few_rows_told_apart_do_not_ask_for_boundless_certainty() -> None:
    truth, probability = np.array([True, True, False, False]), np.array([0.7, 0.8, 0.2, 0.3])
    found = fit_temperature(truth, probability)
    assert 0.5 < found < 2
    assert scale(probability, found).min() > 0


@pytest.mark.parametrize("probability", [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
def test_extreme_and_useless_probabilities_give_a_temperature_in_range(probability: list[float]) -> None:
    found = fit_temperature(np.array([False, True]), np.array(probability))
    assert TEMPERATURES[0] <= found <= TEMPERATURES[1]
    assert np.isfinite(scale(np.array(probability), found)).all()
