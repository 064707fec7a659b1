"""Held-out rows, and what is fitted for them on other rows: thresholds and temperatures, chosen on other patients' predictions.

Axes: N rows (slices at slice level, studies at study level), L labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from pipeline.calibration import fit_temperature, scale
from pipeline.labels import LABELS, UNKNOWN

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """Held-out rows: what is known, what was predicted, and whose they are."""

    labels_NL: npt.NDArray[np.int8]
    """1, 0, −1 unknown."""
    probabilities_NL: Floats
    study_N: npt.NDArray[np.int64]
    patient_N: npt.NDArray[Any]
    """Patient keys, str."""
    fold_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.study_N)

    def of(self, label: int) -> tuple[Bools, Bools, Floats]:
        """One label: which rows know it, bool [N]; and of those the truth and the probability, [known]."""
        known_N = self.labels_NL[:, label] != UNKNOWN
        return known_N, self.labels_NL[known_N, label] == 1, self.probabilities_NL[known_N, label]


@dataclass(frozen=True)
class Decisions:
    """Calls made at thresholds that were chosen on other rows."""

    called: Bools
    """bool [known]"""
    thresholds: tuple[float, ...]
    """One for each group of rows, chosen on all the other groups."""


@dataclass(frozen=True)
class Scaled:
    """Probabilities after temperature scaling, by temperatures that were fitted on other rows."""

    probability: Floats
    """float64 [known]"""
    temperatures: tuple[float, ...]
    """One for each group of rows, fitted on all the other groups."""


@dataclass(frozen=True)
class Judged:
    """One label's known rows with all that is fitted on other rows; made once, for the figures, intervals and pictures."""

    label: int
    known_N: Bools
    truth: Bools
    probability: Floats
    decisions: Decisions | None
    scaled: Scaled | None


def to_studies(slices: Scored) -> Scored:
    """One row a study: its probability is the highest of its slices, its label the highest that is known of them."""
    study, first, row = np.unique(slices.study_N, return_index=True, return_inverse=True)
    labels_NL = np.full((len(study), slices.labels_NL.shape[1]), UNKNOWN, np.int8)
    probabilities_NL = np.zeros((len(study), slices.labels_NL.shape[1]))
    np.maximum.at(labels_NL, row, slices.labels_NL)
    np.maximum.at(probabilities_NL, row, slices.probabilities_NL)
    return Scored(labels_NL, probabilities_NL, study, slices.patient_N[first], slices.fold_N[first])


def judge(scored: Scored) -> list[Judged]:
    """Every label's known rows, called and scaled."""
    return [judge_label(scored, label) for label in range(len(LABELS))]


def judge_label(scored: Scored, label: int) -> Judged:
    """One label's known rows, called and scaled."""
    return Judged(label, *scored.of(label), decide(scored, label), scale_label(scored, label))


def has_both(truth: Bools) -> bool:
    """Whether there are positives and negatives, without which no ROC curve exists."""
    return bool(truth.any() and not truth.all())


def decide(scored: Scored, label: int) -> Decisions | None:
    """Call each row at a threshold chosen (Youden's J) on other patients' rows.

    With several folds a fold's threshold comes from the other folds; with one, from the other half of the patients.

    Returns:
        The calls, or None if some group's other rows lack a class, so that they have no threshold to give.
    """
    _, truth, probability = scored.of(label)
    called = np.zeros(len(truth), bool)
    thresholds = []
    for here in _held_out_groups(scored, label):
        thresholds.append(youden_threshold(truth[~here], probability[~here]))
        called[here] = probability[here] >= thresholds[-1]
    return Decisions(called, tuple(thresholds)) if thresholds else None


def scale_label(scored: Scored, label: int) -> Scaled | None:
    """Scale each row by a temperature fitted on other patients' rows, grouped as for `decide`; None as there."""
    _, truth, probability = scored.of(label)
    after = np.zeros(len(truth))
    temperatures = []
    for here in _held_out_groups(scored, label):
        temperatures.append(fit_temperature(truth[~here], probability[~here]))
        after[here] = scale(probability[here], temperatures[-1])
    return Scaled(after, tuple(temperatures)) if temperatures else None


def _held_out_groups(scored: Scored, label: int) -> list[Bools]:
    """The groups of the label's known rows, bool [known] each; none if the rows outside one of them lack a class."""
    known_N, truth, _ = scored.of(label)
    if not has_both(truth):
        return []
    group = _groups(truth, scored.patient_N[known_N], scored.fold_N[known_N])
    groups = [group == one for one in np.unique(group)]
    return groups if all(has_both(truth[~here]) for here in groups) else []


def fit_operating_points(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """For new rows: by label the temperature and, on the probability after scaling by it, the threshold, fitted on all rows.

    Both rules are those of the cross-fitted figures, which alone are scores: what is fitted on all rows cannot be scored on them.
    A label without cross-fitted calls has neither, since nobody could say what they are worth.
    """
    return {LABELS[one.label]: _fit_operating_point(one) for one in judged}


def _fit_operating_point(judged: Judged) -> dict[str, Any]:
    truth, temperature, threshold = judged.truth, None, None
    if judged.decisions is not None:
        temperature = fit_temperature(truth, judged.probability)
        threshold = youden_threshold(truth, scale(judged.probability, temperature))
    counts = {"positives": int(truth.sum()), "negatives": int((~truth).sum())}
    return {"temperature": temperature, "threshold": threshold, **counts}


def youden_threshold(truth: Bools, probability: Floats) -> float:
    """The threshold with the highest sensitivity + specificity; halfway to the next lower probability.

    Every threshold between two neighbouring probabilities is as good here; the middle is the least tuned to these rows.
    """
    fpr, tpr, threshold = roc_curve(truth, probability, drop_intermediate=False)
    best = 1 + int(np.argmax((tpr - fpr)[1:]))  # the first point, at infinity, calls nothing positive
    lower = threshold[min(best + 1, len(threshold) - 1)]
    return float((threshold[best] + lower) / 2)


def _groups(truth: Bools, patient: npt.NDArray[Any], fold: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The folds, if there are several; else two halves of the patients, with half of the positive ones in each."""
    if len(np.unique(fold)) > 1:
        return fold
    keys, row = np.unique(patient.astype(str), return_inverse=True)
    is_positive = np.zeros(len(keys), bool)
    np.logical_or.at(is_positive, row, truth)
    drawn = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    order = sorted(range(len(keys)), key=lambda patient: (not is_positive[patient], drawn[patient]))
    half = np.empty(len(keys), np.int64)
    half[order] = np.arange(len(keys)) % 2
    return half[row]
