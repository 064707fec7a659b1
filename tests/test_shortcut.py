"""Headers alone beside the network, and the network on rows that the headers cannot tell apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from pipeline.baseline import balance_bins, balance_weights
from pipeline.bootstrap import resample
from pipeline.held_out import Scored, judge, to_studies
from pipeline.labels import ANY, LABELS
from pipeline.metrics import auc, statistics
from pipeline.shortcut import score_balanced, score_headers, shortcut_statistics

PATIENTS, SLICES = 250, 8


def made(*, looks: bool, seed: int = 0) -> tuple[dict[str, Scored], dict[str, np.ndarray]]:
    """Bleeds that the headers foretell in part; a network that looks at the slice, or repeats what the headers say."""
    rng = np.random.default_rng(seed)
    study = np.repeat(np.arange(PATIENTS), SLICES)
    shape = (len(study), len(LABELS))
    told = rng.normal(0, 1, PATIENTS)[study][:, None] + rng.normal(0, 0.5, shape)
    labels = (rng.random(shape) < 1 / (1 + np.exp(1 - 1.5 * told))).astype(np.int8)
    said = 1 / (1 + np.exp(-told))
    own = labels * 1.5 + rng.normal(0, 1, shape) if looks else told + rng.normal(0, 0.3, shape)
    patient = np.array([f"p{one:04}" for one in study], object)
    slices = Scored(labels, 1 / (1 + np.exp(-own)), study, patient, study % 2)
    alone = to_studies(Scored(labels, said, study, patient, study % 2))
    return {"slice": slices, "study": to_studies(slices)}, {"slice": said, "study": alone.probabilities_NL}


def scores(*, looks: bool) -> tuple[dict[str, Scored], dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    levels, said = made(looks=looks)
    patients = sorted(set(levels["slice"].patient_N))
    wanted = shortcut_statistics(levels, said, patients=patients)
    for level, scored in levels.items():
        of_level = statistics(scored, judge(scored), patients=patients, prevalence=0.1)
        wanted[f"{level}/any/ranks"] = of_level["any/ranks"]
    drawn = resample(wanted, patients=len(patients), resamples=100, seed=0)
    headers = {level: score_headers(levels[level], said[level], drawn, level=level) for level in levels}
    return (
        levels,
        said,
        headers,
        {level: score_balanced(levels[level], said[level], drawn, level=level) for level in levels},
    )


def test_figures_by_slice_and_study_equal_scikit_learns() -> None:
    levels, said, headers, balanced = scores(looks=True)
    for level, scored in levels.items():
        for label, name in enumerate(LABELS):
            truth, alone = scored.labels_NL[:, label], said[level][:, label]
            assert headers[level]["auc"][name] == pytest.approx(sklearn.metrics.roc_auc_score(truth, alone))
            assert headers[level]["log_loss"][name] == pytest.approx(sklearn.metrics.log_loss(truth, alone))
            bins = balance_bins(truth == 1, alone)
            assert bins is not None
            weights = balance_weights(truth == 1, bins)
            for who, score in (("network", scored.probabilities_NL[:, label]), ("headers", alone)):
                expected = sklearn.metrics.roc_auc_score(truth, score, sample_weight=weights)
                assert balanced[level][name][who] == pytest.approx(expected, abs=1e-12)
        above = auc(*scored.of(ANY)[1:]) - headers[level]["auc"]["any"]  # type: ignore[operator]
        assert headers[level]["any_auc_above_headers"] == pytest.approx(above)
        low, high = headers[level]["any_auc_above_headers_ci"]
        assert low < above < high
        low, high = headers[level]["any_log_loss_ci"]
        assert low < headers[level]["any_log_loss"] < high


@pytest.mark.parametrize("looks", [True, False])
def test_network_that_looks_keeps_its_skill_on_balanced_rows_and_one_that_reads_headers_loses_it(looks: bool) -> None:
    _, _, headers, balanced = scores(looks=looks)
    assert headers["slice"]["auc"]["any"] > 0.75
    any_of = balanced["slice"]["any"]
    assert any_of["headers"] == pytest.approx(0.5, abs=0.02), "the balancing works"
    low, high = any_of["network_ci"]
    assert low < any_of["network"] < high
    assert any_of["network"] > 0.82 if looks else any_of["network"] < 0.55
    assert balanced["study"]["any"]["headers"] == pytest.approx(0.5, abs=0.05)


def test_headers_that_know_the_answer_leave_no_rows_to_compare() -> None:
    levels, _ = made(looks=True)
    known = {level: np.where(scored.labels_NL == 1, 0.9, 0.1) for level, scored in levels.items()}
    patients = sorted(set(levels["slice"].patient_N))
    drawn = resample(shortcut_statistics(levels, known, patients=patients), patients=PATIENTS, resamples=5, seed=0)
    nothing = {"network": None, "network_ci": None, "headers": None, "headers_ci": None}
    assert score_balanced(levels["slice"], known["slice"], drawn, level="slice")["any"] == {"positives": 0, **nothing}
