"""Scores on plain arrays, for each label, at slice and at study level, each beside what guessing would score.

Axes: N rows (slices at slice level, studies at study level), L labels. A label of −1 is unknown and left out of every
figure. A figure that the data cannot give (one class only, too few positive patients) is None, never NaN.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pipeline.labels import ANY, LABEL_WEIGHTS, LABELS, UNKNOWN

SMALLEST_PROBABILITY = 1e-15
"""The challenge clips probabilities here; in float32 one minus it would be one, so the sums are made in float64."""

CURVE_POINTS = 200
"""Points of a thinned ROC curve: neighbours then lie 0.01 apart, less than a line's width in any figure."""

ALL_FOLDS = "all"

AVERAGED = ("auc", "average_precision", "sensitivity", "specificity", "log_loss", "base_rate_log_loss")

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
class Curve:
    """A ROC curve: a row is called positive where its probability is at least the threshold."""

    label: str
    fold: str
    """A fold's number, or "all"."""
    fpr: Floats
    tpr: Floats
    threshold: Floats


@dataclass(frozen=True)
class Decisions:
    """Calls made at thresholds that were chosen on other rows."""

    called: Bools
    """bool [known]"""
    thresholds: tuple[float, ...]
    """One for each group of rows, chosen on all the other groups."""


def to_studies(slices: Scored) -> Scored:
    """One row a study: its probability is the highest of its slices, its label the highest that is known of them."""
    study, first, row = np.unique(slices.study_N, return_index=True, return_inverse=True)
    labels_NL = np.full((len(study), slices.labels_NL.shape[1]), UNKNOWN, np.int8)
    probabilities_NL = np.zeros((len(study), slices.labels_NL.shape[1]))
    np.maximum.at(labels_NL, row, slices.labels_NL)
    np.maximum.at(probabilities_NL, row, slices.probabilities_NL)
    return Scored(labels_NL, probabilities_NL, study, slices.patient_N[first], slices.fold_N[first])


def score(scored: Scored) -> dict[str, Any]:
    """Every figure of one level.

    Returns:
        One entry a label, then `macro` (the mean over the labels that have the figure), the weighted multi-label log
        loss, and the same for someone who predicts each label's prevalence.
    """
    by_label = {name: score_label(scored, label) for label, name in enumerate(LABELS)}
    return {
        **by_label,
        "macro": _macro(list(by_label.values())),
        "weighted_log_loss": weighted_log_loss(scored.labels_NL, scored.probabilities_NL),
        "base_rate_weighted_log_loss": weighted_log_loss(scored.labels_NL, base_rates(scored.labels_NL)),
    }


def score_label(scored: Scored, label: int) -> dict[str, Any]:
    """The figures of one label, with the number of positives that they rest on."""
    known_N, truth, probability = scored.of(label)
    decisions = decide(scored, label)
    sensitivity, specificity = _rates(truth, decisions)
    rate = np.full(len(truth), truth.mean() if len(truth) else 0.0)
    return {
        "positives": int(truth.sum()),
        "negatives": int((~truth).sum()),
        "positive_studies": len(np.unique(scored.study_N[known_N][truth])),
        "positive_patients": len(np.unique(scored.patient_N[known_N][truth].astype(str))),
        "auc": auc(truth, probability),
        "average_precision": average_precision(truth, probability),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "thresholds": list(decisions.thresholds) if decisions else None,
        "log_loss": log_loss(truth, probability),
        "base_rate_log_loss": log_loss(truth, rate),
        "auc_by_fold": {
            str(fold): auc(truth[here], probability[here])
            for fold in np.unique(scored.fold_N)
            for here in [scored.fold_N[known_N] == fold]
        },
    }


def _rates(truth: Bools, decisions: Decisions | None) -> tuple[float | None, float | None]:
    if decisions is None:
        return None, None
    return float(decisions.called[truth].mean()), float((~decisions.called[~truth]).mean())


def _macro(by_label: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {name: [figures[name] for figures in by_label if figures[name] is not None] for name in AVERAGED}
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return {"labels": len(found["auc"]), **means}


def has_both(truth: Bools) -> bool:
    """Whether there are positives and negatives, without which no ROC curve exists."""
    return bool(truth.any() and not truth.all())


def auc(truth: Bools, probability: npt.NDArray[Any]) -> float | None:
    """Area under the ROC curve; None with one class only."""
    return float(roc_auc_score(truth, probability)) if has_both(truth) else None


def average_precision(truth: Bools, probability: Floats) -> float | None:
    """Average precision; None with one class only."""
    return float(average_precision_score(truth, probability)) if has_both(truth) else None


def log_loss(truth: Bools, probability: Floats) -> float | None:
    """Mean log loss of one label, probabilities clipped as the challenge does; None without rows."""
    return float(_losses(truth, probability).mean()) if len(truth) else None


def weighted_log_loss(labels_NL: npt.NDArray[np.int8], probabilities_NL: Floats) -> float | None:
    """The challenge's metric: `any` counts twice, the mean is over the weights of what is known; None if nothing is."""
    known_NL = labels_NL != UNKNOWN
    weights_NL = np.where(known_NL, np.array(LABEL_WEIGHTS), 0.0)
    if not known_NL.any():
        return None
    return float((weights_NL * _losses(labels_NL == 1, probabilities_NL)).sum() / weights_NL.sum())


def _losses(truth: Bools, probability: Floats) -> Floats:
    clipped = np.clip(np.asarray(probability, np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return -np.where(truth, np.log(clipped), np.log1p(-clipped))


def base_rates(labels_NL: npt.NDArray[np.int8]) -> Floats:
    """Each label's prevalence among the rows that know it, repeated for every row: float64 [N, L]."""
    known_NL = labels_NL != UNKNOWN
    rates_L = (labels_NL == 1).sum(axis=0) / np.maximum(known_NL.sum(axis=0), 1)
    return np.broadcast_to(rates_L, labels_NL.shape).astype(np.float64)


def decide(scored: Scored, label: int) -> Decisions | None:
    """Call each row at a threshold chosen (Youden's J) on other patients' rows.

    With several folds a fold's threshold comes from the other folds; with one, from the other half of the patients.

    Returns:
        The calls, or None if some group's other rows lack a class, so that they have no threshold to give.
    """
    known_N, truth, probability = scored.of(label)
    if not has_both(truth):
        return None
    group = _groups(truth, scored.patient_N[known_N], scored.fold_N[known_N])
    called = np.zeros(len(truth), bool)
    thresholds = []
    for one in np.unique(group):
        here = group == one
        if not has_both(truth[~here]):
            return None
        thresholds.append(youden_threshold(truth[~here], probability[~here]))
        called[here] = probability[here] >= thresholds[-1]
    return Decisions(called, tuple(thresholds))


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


def roc_curves(scored: Scored) -> list[Curve]:
    """For each label that has both classes: the curve of all rows, then one a fold if there are several."""
    folds = np.unique(scored.fold_N)
    curves = []
    for label, name in enumerate(LABELS):
        known_N, truth, probability = scored.of(label)
        subsets = {ALL_FOLDS: np.ones(len(truth), bool)}
        if len(folds) > 1:
            subsets.update({str(fold): scored.fold_N[known_N] == fold for fold in folds})
        for fold, here in subsets.items():
            if has_both(truth[here]):
                curves.append(Curve(name, fold, *roc_curve(truth[here], probability[here])))
    return curves


def thin(curve: Curve, points: int = CURVE_POINTS) -> Curve:
    """At most `points` of a curve's own points, evenly spread along its length, both ends among them."""
    if len(curve.fpr) <= points:
        return curve
    walked = curve.fpr + curve.tpr  # both only grow, so that this is the way along the staircase
    kept = np.unique(np.searchsorted(walked, np.linspace(0, walked[-1], points - 1)))
    kept = np.union1d(kept, [0, len(walked) - 1])
    return Curve(curve.label, curve.fold, curve.fpr[kept], curve.tpr[kept], curve.threshold[kept])


def score_counting(slices: Scored, counts_N: npt.NDArray[Any]) -> dict[str, Any]:
    """AUC of a count as a classifier of the same slices, and how far the model's AUC for `any` lies above it."""
    by_label = {}
    for label, name in enumerate(LABELS):
        known_N, truth, _ = slices.of(label)
        by_label[name] = auc(truth, counts_N[known_N])
    _, truth, probability = slices.of(ANY)
    model, counting = auc(truth, probability), by_label["any"]
    above = None if model is None or counting is None else model - counting
    return {"any_auc": counting, "any_auc_above_counting": above, "auc": by_label}
