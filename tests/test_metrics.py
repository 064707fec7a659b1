"""The scores against scikit-learn's, and the two promises that scikit-learn does not make: no leak, and no NaN."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import sklearn.metrics

from pipeline.bootstrap import Statistic, draw, interval, resample
from pipeline.calibration import reliability, scale
from pipeline.curves import Curve, average_roc_curves, precision_recall_curves, reliabilities, roc_curves, thin
from pipeline.held_out import (
    Judged,
    Scored,
    decide,
    fit_operating_points,
    judge,
    judge_label,
    scale_label,
    to_studies,
    youden_threshold,
)
from pipeline.labels import ANY, LABEL_WEIGHTS, LABELS
from pipeline.metrics import (
    RATES,
    base_rates,
    log_loss,
    score_counting,
    sensitivity_at,
    statistics,
    to_prevalence,
    weighted_log_loss,
    with_intervals,
)
from pipeline.metrics import score as score_judged
from pipeline.metrics import score_label as score_judged_label


def score(scored: Scored, *, prevalence: float = 0.1) -> dict[str, Any]:
    return score_judged(scored, judge(scored), prevalence=prevalence)


def score_label(scored: Scored, label: int) -> dict[str, Any]:
    return score_judged_label(scored, judge_label(scored, label), weights_N=to_prevalence(scored, 0.1))


def make_scored(*, patients: int = 40, slices: int = 10, folds: int = 1, seed: int = 0, unknown: float = 0.0) -> Scored:
    """A study a patient; probabilities that know a little."""
    rng = np.random.default_rng(seed)
    rows = patients * slices
    labels_NL = (rng.random((rows, len(LABELS))) < 0.2).astype(np.int8)
    labels_NL[:, ANY] = labels_NL[:, :ANY].max(axis=1)
    probabilities_NL = np.clip(0.35 + 0.25 * labels_NL + rng.normal(0, 0.15, labels_NL.shape), 0.001, 0.999)
    labels_NL[rng.random(labels_NL.shape) < unknown] = -1
    study = np.repeat(np.arange(patients), slices)
    return Scored(
        labels_NL, probabilities_NL, study, np.array([f"p{number}" for number in study], object), study % folds
    )


def half_free(scored: Scored) -> Scored:
    """Every other pair of studies without hemorrhage, as on a ward."""
    scored.labels_NL[scored.study_N // 2 % 2 == 0] = 0
    return scored


@pytest.mark.parametrize("unknown", [0.0, 0.3])
@pytest.mark.parametrize("label", range(len(LABELS)))
def test_figures_equal_scikit_learns_on_the_known_rows(label: int, unknown: float) -> None:
    scored = make_scored(unknown=unknown)
    known = scored.labels_NL[:, label] != -1
    truth, probability = scored.labels_NL[known, label], scored.probabilities_NL[known, label]
    figures = score_label(scored, label)
    assert figures["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, probability), abs=1e-12)
    assert figures["average_precision"] == pytest.approx(sklearn.metrics.average_precision_score(truth, probability))
    assert figures["log_loss"] == pytest.approx(sklearn.metrics.log_loss(truth, probability), abs=1e-12)
    rate = np.full(len(truth), truth.mean())
    assert figures["brier"] == pytest.approx(sklearn.metrics.brier_score_loss(truth, probability), abs=1e-12)
    assert figures["base_rate_log_loss"] == pytest.approx(sklearn.metrics.log_loss(truth, rate), abs=1e-12)
    assert (figures["positives"], figures["negatives"]) == (truth.sum(), (truth == 0).sum())
    assert figures["positive_patients"] == len(set(scored.patient_N[known][truth == 1]))


def test_figures_of_the_calls_equal_scikit_learns() -> None:
    scored = make_scored(folds=3)
    figures, decisions = score_label(scored, ANY), decide(scored, ANY)
    assert decisions is not None
    truth, called = scored.labels_NL[:, ANY], decisions.called
    expected = {
        "sensitivity": sklearn.metrics.recall_score(truth, called),
        "specificity": sklearn.metrics.recall_score(truth, called, pos_label=0),
        "ppv": sklearn.metrics.precision_score(truth, called),
        "npv": sklearn.metrics.precision_score(truth, called, pos_label=0),
        "f1": sklearn.metrics.f1_score(truth, called),
        "accuracy": sklearn.metrics.accuracy_score(truth, called),
    }
    assert set(expected) == set(RATES)
    assert {name: figures[name] for name in RATES} == pytest.approx(expected, abs=1e-12)
    (free, false), (missed, found) = sklearn.metrics.confusion_matrix(truth, called)
    assert figures["confusion"] == {"found": found, "missed": missed, "false_alarms": false, "rightly_free": free}
    assert len(figures["thresholds"]) == 3


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_micro_auc_equals_scikit_learns(unknown: float) -> None:
    scored = make_scored(unknown=unknown)
    known = scored.labels_NL != -1
    expected = sklearn.metrics.roc_auc_score(scored.labels_NL[known], scored.probabilities_NL[known])
    assert score(scored)["micro_auc"] == pytest.approx(expected, abs=1e-12)
    if not unknown:
        whole = sklearn.metrics.roc_auc_score(scored.labels_NL, scored.probabilities_NL, average="micro")
        assert expected == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("specificity", [0.9, 0.95])
def test_sensitivity_at_a_specificity_is_the_best_of_all_thresholds(specificity: float) -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(200) < 100  # 100 negatives, so that 0.9 and 0.95 are met exactly
    probability = np.round(np.clip(0.3 * truth + rng.normal(0.4, 0.2, 200), 0, 1), 2)
    best = max(
        sklearn.metrics.recall_score(truth, probability >= threshold)
        for threshold in np.linspace(0, 1.01, 102)
        if sklearn.metrics.recall_score(~truth, probability < threshold) >= specificity - 1e-12
    )
    assert sensitivity_at(truth, probability, specificity) == pytest.approx(best)


def test_predictive_values_at_another_prevalence_of_studies_are_those_of_bayes() -> None:
    studies = to_studies(half_free(make_scored(patients=200, slices=4, folds=2)))
    figures, prevalence = score(studies, prevalence=0.08)["any"], 0.08
    sensitivity, specificity = figures["sensitivity"], figures["specificity"]
    found, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    free, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    assert figures["ppv_at_prevalence"] == pytest.approx(found / (found + false))
    assert figures["npv_at_prevalence"] == pytest.approx(free / (free + missed))
    assert figures["ppv_at_prevalence"] < figures["ppv"]


def test_predictive_values_at_the_prevalence_that_is_there_are_the_plain_ones() -> None:
    """Slices and subtypes included: only the mix of studies is changed, and here it is not."""
    scored = half_free(make_scored(patients=60, slices=4, folds=2))
    there = float((to_studies(scored).labels_NL[:, ANY] == 1).mean())
    figures = score(scored, prevalence=there)
    for label in LABELS:
        assert figures[label]["ppv_at_prevalence"] == pytest.approx(figures[label]["ppv"])
        assert figures[label]["npv_at_prevalence"] == pytest.approx(figures[label]["npv"])


def test_weights_give_the_studies_the_prevalence_and_the_unknown_ones_none() -> None:
    scored = half_free(make_scored(patients=50, slices=3))
    scored.labels_NL[scored.study_N == 7] = -1
    weights = to_prevalence(scored, 0.2)
    assert weights is not None
    studies = to_studies(scored)
    of_study = weights[np.searchsorted(scored.study_N, studies.study_N)]
    assert of_study[studies.labels_NL[:, ANY] == 1].sum() == pytest.approx(0.2)
    assert of_study.sum() == pytest.approx(1)
    assert of_study[7] == 0
    scored.labels_NL[:, ANY] = 1
    assert to_prevalence(scored, 0.2) is None


def test_temperature_is_not_fitted_on_the_fold_that_it_scales() -> None:
    scored = make_scored(patients=60, folds=2)
    before = scale_label(scored, ANY)
    mine = scored.fold_N == 0
    scored.labels_NL[mine, ANY] = 1 - scored.labels_NL[mine, ANY]  # what is known of fold 0 changes, not what is said
    after = scale_label(scored, ANY)
    assert before is not None
    assert after is not None
    assert after.temperatures[0] == before.temperatures[0]
    assert after.temperatures[1] != before.temperatures[1]
    np.testing.assert_array_equal(after.probability[mine], before.probability[mine])
    expected = scale(scored.probabilities_NL[mine, ANY], before.temperatures[0])
    np.testing.assert_array_equal(before.probability[mine], expected)


def test_temperature_of_noise_does_not_flatter() -> None:
    """Probabilities that are as good as they can be: scaling by another's temperature must not look like a gain."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(20):
        scored = make_scored(patients=30, slices=2)
        probability = rng.uniform(0.2, 0.8, len(scored))
        scored.probabilities_NL[:, ANY] = probability
        scored.labels_NL[:, ANY] = rng.random(len(scored)) < probability
        figures = score_label(scored, ANY)
        gains.append(figures["log_loss"] - figures["log_loss_scaled"])
    assert np.mean(gains) < 0


def test_scaled_figures_are_those_of_scikit_learn_on_the_scaled_probabilities() -> None:
    scored = make_scored(folds=2)
    figures, judged = score(scored), judge(scored)
    after = np.stack([one.scaled.probability for one in judged if one.scaled], axis=1)
    truth = scored.labels_NL[:, ANY]
    assert figures["any"]["log_loss_scaled"] == pytest.approx(sklearn.metrics.log_loss(truth, after[:, ANY]))
    assert figures["any"]["brier_scaled"] == pytest.approx(sklearn.metrics.brier_score_loss(truth, after[:, ANY]))
    assert figures["weighted_log_loss_scaled"] == pytest.approx(weighted_log_loss(scored.labels_NL, after))
    bins, bins_after = reliabilities(judged)["any"]
    assert bins_after is not None
    assert (figures["any"]["ece"], figures["any"]["ece_scaled"]) == (bins.error, bins_after.error)


def test_each_patient_drawn_once_gives_the_figures_themselves() -> None:
    """The bootstrap's way of computing and the plain one agree, for every figure that has an interval."""
    scored = half_free(make_scored(patients=40, folds=2, unknown=0.2))
    figures, judged = score(scored), judge(scored)
    found = set()
    for key, statistic in statistics_of(scored, judged).items():
        label = key.split("/")[0]
        expected = {**figures, "auc": figures["micro_auc"]} if label == "whole" else figures[label]
        values = statistic.of(np.ones((1, 40)))
        if key == "whole/ranks":
            del values["average_precision"]  # not among the scores
        for name, value in values.items():
            assert value[0] == pytest.approx(expected[name], abs=1e-12), key
            found.add((label, name))
    for name in (
        "sensitivity_at_90",
        "sensitivity_at_95",
        "ppv_at_prevalence",
        "npv_at_prevalence",
        "ece",
        "ece_scaled",
    ):
        assert ("subdural", name) in found
    assert ("whole", "weighted_log_loss_scaled") in found


def test_each_draw_gives_what_the_plain_way_makes_of_the_patients_drawn() -> None:
    """For the figures whose draws are not plain sums: the drawn patients' rows are scored as a cohort of their own."""
    scored = half_free(make_scored(patients=40, folds=2, unknown=0.1))
    judged, patients = judge(scored), sorted(set(scored.patient_N))
    drawn = resample(statistics_of(scored, judged), patients=40, resamples=25, seed=3)
    counts_DP = np.concatenate(list(draw(40, resamples=25, seed=3)))
    for number, counts_P in enumerate(counts_DP):
        copies = [(p, k) for p, times in enumerate(counts_P) for k in range(int(times))]
        rows = [np.flatnonzero(scored.patient_N == patients[p]) for p, _ in copies]
        taken, study = np.concatenate(rows), np.repeat(np.arange(len(copies)), [len(one) for one in rows])
        cohort = Scored(scored.labels_NL[taken], scored.probabilities_NL[taken], study, study, scored.fold_N[taken])
        weights_N = to_prevalence(cohort, 0.1)
        for one in judged:
            known_N, place = scored.labels_NL[:, one.label] != -1, np.cumsum(one.known_N) - 1
            kept = taken[known_N[taken]]
            assert one.decisions is not None
            assert one.scaled is not None
            called, after = one.decisions.called[place[kept]], one.scaled.probability[place[kept]]
            truth, probability = one.truth[place[kept]], one.probability[place[kept]]
            assert weights_N is not None
            weights = weights_N[known_N[taken]]
            figures = {name: values[number] for of in _of(drawn, one.label) for name, values in of.items()}
            expected = {
                "sensitivity_at_90": sensitivity_at(truth, probability, 0.9),
                "sensitivity_at_95": sensitivity_at(truth, probability, 0.95),
                "ppv_at_prevalence": sklearn.metrics.precision_score(truth, called, sample_weight=weights),
                "npv_at_prevalence": sklearn.metrics.precision_score(truth, called, pos_label=0, sample_weight=weights),
                "ece": reliability(truth, probability).error,
                "ece_scaled": reliability(truth, after).error,
            }
            assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def _of(drawn: dict[str, dict[str, np.ndarray]], label: int) -> list[dict[str, np.ndarray]]:
    return [figures for key, figures in drawn.items() if key.startswith(f"{LABELS[label]}/")]


def statistics_of(scored: Scored, judged: list[Judged]) -> dict[str, Statistic]:
    return statistics(scored, judged, patients=sorted(set(scored.patient_N)), prevalence=0.1)


def test_intervals_stand_behind_their_figures_and_hold_them() -> None:
    scored = half_free(make_scored(patients=60, folds=2))
    drawn = resample(statistics_of(scored, judge(scored)), patients=60, resamples=300, seed=0)
    figures = with_intervals(score(scored), drawn)
    at_points = ("sensitivity_at_90", "sensitivity_at_95", "ppv_at_prevalence", "npv_at_prevalence")
    for name in (
        "auc",
        "average_precision",
        "log_loss",
        "brier",
        "log_loss_scaled",
        "brier_scaled",
        *RATES,
        *at_points,
    ):
        low, high = figures["any"][f"{name}_ci"]
        assert low < figures["any"][name] < high
        names = list(figures["any"])
        assert names.index(f"{name}_ci") == names.index(name) + 1
    for name in ("micro_auc", "weighted_log_loss", "weighted_log_loss_scaled"):
        low, high = figures[f"{name}_ci"]
        assert low < figures[name] < high
    low, high = figures["any"]["ece_ci"]
    low_drawn, high_drawn = interval(drawn["any/gaps"]["ece"]) or (0, 0)
    twice = 2 * figures["any"]["ece"]
    assert (low, high) == pytest.approx((max(twice - high_drawn, 0), twice - low_drawn)), "mirrored at the figure"
    low, high = figures["macro"]["auc_ci"]
    assert low < figures["macro"]["auc"] < high
    mean = np.mean([drawn[f"{label}/ranks"]["auc"] for label in LABELS], axis=0)
    assert [low, high] == interval(mean)


def test_intervals_do_not_depend_on_the_order_of_the_rows() -> None:
    scored = make_scored(patients=20, folds=2)
    order = np.random.default_rng(0).permutation(len(scored))
    other = Scored(*(getattr(scored, name)[order] for name in Scored.__dataclass_fields__))
    one, two = (
        resample(statistics_of(rows, judge(rows)), patients=20, resamples=60, seed=0) for rows in (scored, other)
    )
    for key, figures in one.items():
        for name, values in figures.items():
            np.testing.assert_allclose(values, two[key][name], atol=1e-12)


def test_precision_recall_curves_are_points_of_scikit_learns_from_end_to_end() -> None:
    scored = make_scored(patients=200)
    curves = {curve.label: curve for curve in precision_recall_curves(scored, points=50)}
    assert set(curves) == set(LABELS)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(scored.labels_NL[:, 0], scored.probabilities_NL[:, 0])
    whole, found = set(zip(recall, precision, strict=True)), curves["epidural"]
    assert set(zip(found.recall, found.precision, strict=True)) <= whole
    assert (found.recall[0], found.recall[-1]) == (0, 1)
    assert len(found.recall) <= 50


def test_weighted_log_loss_equals_scikit_learns_with_label_weights() -> None:
    scored = make_scored()
    each = [
        sklearn.metrics.log_loss(scored.labels_NL[:, label], scored.probabilities_NL[:, label])
        for label in range(len(LABELS))
    ]
    expected = np.average(each, weights=LABEL_WEIGHTS)
    assert weighted_log_loss(scored.labels_NL, scored.probabilities_NL) == pytest.approx(expected, abs=1e-12)


def test_weighted_log_loss_of_masked_labels_equals_scikit_learns_with_row_weights() -> None:
    scored = make_scored(unknown=0.4)
    known = scored.labels_NL != -1
    weights = np.broadcast_to(LABEL_WEIGHTS, known.shape)[known]
    expected = sklearn.metrics.log_loss(scored.labels_NL[known], scored.probabilities_NL[known], sample_weight=weights)
    assert weighted_log_loss(scored.labels_NL, scored.probabilities_NL) == pytest.approx(expected, abs=1e-12)


def test_base_rates_of_the_challenge_score_what_is_published() -> None:
    rates = np.array([0.0041, 0.048, 0.035, 0.048, 0.063, 0.144])
    rows = 100_000
    labels_NL = (np.arange(rows)[:, None] < np.rint(rates * rows)).astype(np.int8)
    assert weighted_log_loss(labels_NL, base_rates(labels_NL)) == pytest.approx(0.232, abs=0.002)


def test_a_certain_mistake_costs_what_the_challenge_charges() -> None:
    assert log_loss(np.array([True]), np.array([0.0])) == pytest.approx(-np.log(1e-15))
    assert log_loss(np.array([False]), np.array([1.0], np.float32)) == pytest.approx(-np.log(1e-15), rel=0.01)


def test_unknown_labels_change_nothing_whatever_was_predicted_for_them() -> None:
    scored = make_scored(unknown=0.3)
    guess = np.where(scored.labels_NL == -1, 1 - scored.probabilities_NL, scored.probabilities_NL)
    other = Scored(scored.labels_NL, guess, scored.study_N, scored.patient_N, scored.fold_N)
    assert score(other) == score(scored)


@pytest.mark.parametrize("value", [0, 1, -1])
def test_label_with_one_class_gives_null_without_a_warning(value: int) -> None:
    scored = make_scored(slices=1, folds=2)
    scored.labels_NL[:, 0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = score(scored)
        study = score(to_studies(scored))
        curves = roc_curves(scored)
    fitted = ("thresholds", "temperatures", "confusion", "ece_scaled", "ppv_at_prevalence", "sensitivity_at_90")
    for key in ("auc", "average_precision", *RATES, *fitted):
        assert figures["epidural"][key] is None
    assert figures["macro"]["labels"] == study["macro"]["labels"] == 5
    assert "epidural" not in {curve.label for curve in curves}
    json.dumps([figures, study], allow_nan=False)


def test_study_takes_the_highest_probability_and_the_highest_known_label() -> None:
    labels_NL = np.full((5, 6), -1, np.int8)
    labels_NL[:, ANY] = [0, 1, -1, -1, 0]
    probabilities_NL = np.tile(np.array([0.1, 0.2, 0.9, 0.3, 0.4])[:, None], 6)
    study, patient = np.array([4, 4, 4, 7, 9]), np.array(["a", "a", "a", "b", "c"], object)
    studies = to_studies(Scored(labels_NL, probabilities_NL, study, patient, np.zeros(5, int)))
    assert studies.study_N.tolist() == [4, 7, 9]
    assert studies.labels_NL[:, ANY].tolist() == [1, -1, 0]
    assert studies.probabilities_NL[:, ANY].tolist() == [0.9, 0.3, 0.4]
    assert studies.patient_N.tolist() == ["a", "b", "c"]


def shifted(groups: int, *, folds: bool) -> Scored:
    """Each group is told apart perfectly, but each by a threshold of its own: chosen on itself it scores 1, else less."""
    scored = make_scored(patients=40, folds=groups if folds else 1, seed=1)
    truth = scored.labels_NL[:, ANY] == 1
    scored.probabilities_NL[:, ANY] = np.where(truth, 0.3, 0.2) + 0.4 * (scored.fold_N if folds else 0)
    return scored


def test_threshold_is_not_chosen_on_the_fold_that_it_scores() -> None:
    scored = shifted(2, folds=True)
    figures = score_label(scored, ANY)
    # Fold 0's threshold comes from fold 1 (0.65) and calls nothing; fold 1's from fold 0 (0.25) calls all.
    assert figures["thresholds"] == pytest.approx([0.65, 0.25])
    truth = scored.labels_NL[:, ANY] == 1
    assert figures["sensitivity"] == pytest.approx((scored.fold_N[truth] == 1).mean())
    assert figures["specificity"] == pytest.approx((scored.fold_N[~truth] == 0).mean())
    assert figures["auc_by_fold"] == {"0": 1.0, "1": 1.0}


def test_threshold_of_a_single_fold_comes_from_the_other_half_of_the_patients() -> None:
    """One patient's odd probabilities must not move the threshold that this very patient is called by."""
    scored = make_scored(patients=4, slices=30, seed=3)
    before = decide(scored, ANY)
    mine = scored.patient_N == "p0"
    scored.probabilities_NL[mine, ANY] = np.where(scored.labels_NL[mine, ANY] == 1, 0.0001, 0.9999)
    after = decide(scored, ANY)
    assert before is not None
    assert after is not None
    same = [one == other for one, other in zip(before.thresholds, after.thresholds, strict=True)]
    assert sorted(same) == [False, True], "the half with this patient chose another, the other half the same threshold"
    kept = after.thresholds[same.index(True)]
    assert (after.called[mine] == (scored.probabilities_NL[mine, ANY] >= kept)).all()


def test_threshold_of_noise_does_not_flatter() -> None:
    """On its own rows Youden's threshold finds skill in noise; on other rows it must not."""
    skill = []
    for seed in range(30):
        scored = make_scored(patients=20, slices=1, seed=seed)
        scored.labels_NL[:, ANY] = np.arange(20) % 2
        scored.probabilities_NL[:, ANY] = np.random.default_rng(seed).random(20)
        figures = score_label(scored, ANY)
        skill.append(figures["sensitivity"] + figures["specificity"] - 1)
    assert abs(np.mean(skill)) < 0.1


def test_two_positive_patients_are_enough_for_a_threshold_and_one_is_not() -> None:
    scored = make_scored()
    scored.labels_NL[:, 0] = np.isin(scored.patient_N, ["p3", "p17"])
    assert score_label(scored, 0)["sensitivity"] is not None
    scored.labels_NL[:, 0] = scored.patient_N == "p3"
    assert score_label(scored, 0)["sensitivity"] is None
    assert score_label(scored, 0)["auc"] is not None


def test_no_patient_is_in_both_halves_and_the_order_of_rows_does_not_matter() -> None:
    scored = make_scored(seed=5)
    order = np.random.default_rng(0).permutation(len(scored))
    other = Scored(
        scored.labels_NL[order],
        scored.probabilities_NL[order],
        scored.study_N[order],
        scored.patient_N[order],
        scored.fold_N[order],
    )
    one, two = decide(scored, ANY), decide(other, ANY)
    assert one is not None
    assert two is not None
    assert one.thresholds == two.thresholds
    assert (one.called[order] == two.called).all()


def test_youden_threshold_maximises_sensitivity_plus_specificity() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    probability = np.round(np.clip(truth * 0.2 + rng.random(300) * 0.7, 0, 1), 2)
    youden = [
        probability[truth].__ge__(t).mean() + probability[~truth].__lt__(t).mean() for t in np.linspace(0, 1, 1001)
    ]
    chosen = youden_threshold(truth, probability)
    assert (probability[truth] >= chosen).mean() + (probability[~truth] < chosen).mean() == pytest.approx(max(youden))


def test_youden_threshold_of_useless_probabilities_is_finite() -> None:
    assert np.isfinite(youden_threshold(np.array([True, False]), np.array([0.1, 0.9])))
    assert youden_threshold(np.array([True, False]), np.array([0.5, 0.5])) == 0.5


def test_operating_points_have_the_lowest_log_loss_and_the_highest_youden_of_all_rows() -> None:
    scored = make_scored(patients=60, folds=2)
    point = fit_operating_points(judge(scored))["any"]
    truth, probability = scored.labels_NL[:, ANY] == 1, scored.probabilities_NL[:, ANY]
    platt = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))

    def loss(temperature: float) -> float:
        after = scale(probability, temperature)
        return float(-(platt * np.log(after) + (1 - platt) * np.log(1 - after)).sum())

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    assert point["temperature"] == pytest.approx(best.x, rel=1e-5)
    after = scale(probability, point["temperature"])
    fpr, tpr, threshold = sklearn.metrics.roc_curve(truth, after, drop_intermediate=False)
    at = int(np.argmax(tpr - fpr))
    assert threshold[at + 1] < point["threshold"] < threshold[at], (
        "after scaling, halfway to the next lower probability"
    )
    assert ((after >= point["threshold"]) == (after >= threshold[at])).all()


def test_operating_point_that_no_cross_fitted_figure_backs_is_not_given() -> None:
    scored = make_scored(patients=40, folds=2)
    scored.labels_NL[:, 0] = scored.patient_N == "p3"
    scored.labels_NL[:, 1] = -1
    points = fit_operating_points(judge(scored))
    nothing = {"temperature": None, "threshold": None}
    assert points["epidural"] == {**nothing, "positives": 10, "negatives": 390}, "one positive patient"
    assert points["intraparenchymal"] == {**nothing, "positives": 0, "negatives": 0}


def test_roc_curves_equal_scikit_learns_and_come_one_a_fold() -> None:
    scored = make_scored(folds=2)
    curves = {(curve.label, curve.fold): curve for curve in roc_curves(scored)}
    assert set(curves) == {(label, fold) for label in LABELS for fold in ("all", "0", "1")}
    expected: Any = sklearn.metrics.roc_curve(scored.labels_NL[:, ANY], scored.probabilities_NL[:, ANY])
    whole = curves["any", "all"]
    for found, wanted in zip((whole.fpr, whole.tpr, whole.threshold), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert {curve.fold for curve in roc_curves(make_scored(folds=1))} == {"all"}


def test_average_curves_have_the_areas_of_the_average_aucs() -> None:
    scored = make_scored(folds=2)
    micro, macro = average_roc_curves(scored)
    known_NL = scored.labels_NL != -1
    expected: Any = sklearn.metrics.roc_curve(scored.labels_NL[known_NL], scored.probabilities_NL[known_NL])
    np.testing.assert_array_equal(micro.tpr, expected[1])
    figures = score(scored)
    assert sklearn.metrics.auc(micro.fpr, micro.tpr) == pytest.approx(figures["micro_auc"], abs=1e-12)
    assert sklearn.metrics.auc(macro.fpr, macro.tpr) == pytest.approx(figures["macro"]["auc"], abs=1e-12)
    assert (macro.fpr[0], macro.tpr[0], macro.fpr[-1], macro.tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(macro.tpr) >= 0).all()


def test_thinned_curve_keeps_its_ends_and_its_area() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) < 0.2
    fpr, tpr, threshold = sklearn.metrics.roc_curve(truth, rng.normal(truth, 1))
    whole = Curve("any", "all", fpr, tpr, threshold)
    thinned = thin(whole)
    assert len(whole.fpr) > 1000
    assert len(thinned.fpr) <= 200
    assert (thinned.fpr[0], thinned.tpr[0], thinned.fpr[-1], thinned.tpr[-1]) == (0, 0, 1, 1)
    assert sklearn.metrics.auc(thinned.fpr, thinned.tpr) == pytest.approx(sklearn.metrics.auc(fpr, tpr), abs=2e-4)


def test_counting_is_scored_on_the_same_rows_as_the_model() -> None:
    scored = make_scored(unknown=0.2)
    counts = np.random.default_rng(0).integers(0, 50, len(scored)) + 20 * (scored.labels_NL[:, ANY] == 1)
    known = scored.labels_NL[:, ANY] != -1
    counting = score_counting(scored, counts)
    assert counting["any_auc"] == sklearn.metrics.roc_auc_score(scored.labels_NL[known, ANY], counts[known])
    assert counting["any_auc_above_counting"] == score_label(scored, ANY)["auc"] - counting["any_auc"]
