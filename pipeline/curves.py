"""ROC, precision-recall and reliability, as curves to draw and as rows to write.

Axes: N rows, L labels, as in `pipeline.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from pipeline.calibration import Reliability, reliability
from pipeline.held_out import Floats, Judged, Scored, has_both
from pipeline.labels import LABELS, UNKNOWN
from pipeline.metrics import DECIMALS

CURVE_POINTS = 200
"""Points of a thinned ROC curve: neighbours then lie 0.01 apart, less than a line's width in any figure."""

ALL_FOLDS = "all"

MICRO, MACRO = "micro average", "macro average"
"""Stand for a label where a curve is an average over all of them."""


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
class PrecisionRecall:
    """A precision-recall curve, from recall 0 to 1."""

    label: str
    recall: Floats
    precision: Floats


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


def average_roc_curves(scored: Scored) -> list[Curve]:
    """The micro average, all labels' rows ranked together, and the macro average, the labels' mean sensitivity at equal specificity
    (Fawcett 2006), over the labels that have both classes. Nothing where none has."""
    of_labels = [curve for curve in roc_curves(scored) if curve.fold == ALL_FOLDS]
    if not of_labels:
        return []
    known_NL = scored.labels_NL != UNKNOWN
    micro = Curve(MICRO, ALL_FOLDS, *roc_curve(scored.labels_NL[known_NL] == 1, scored.probabilities_NL[known_NL]))
    fpr = np.unique(np.concatenate([curve.fpr for curve in of_labels]))
    tpr = np.mean([_steps_at(curve, fpr) for curve in of_labels], axis=0)
    return [micro, Curve(MACRO, ALL_FOLDS, np.repeat(fpr, 2), tpr, np.full(2 * len(fpr), np.nan))]


def _steps_at(curve: Curve, fpr: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A curve's sensitivity below and above its step at each 1 − specificity, float64 [2 · points]: so the area stays its own."""
    first, last = np.searchsorted(curve.fpr, fpr, "left"), np.searchsorted(curve.fpr, fpr, "right") - 1
    between = np.interp(fpr, curve.fpr, curve.tpr)
    below = np.where(first <= last, curve.tpr[np.minimum(first, len(curve.tpr) - 1)], between)
    above = np.where(first <= last, curve.tpr[last], between)
    return np.stack([below, above], axis=1).ravel()


def thin(curve: Curve, points: int = CURVE_POINTS) -> Curve:
    """At most `points` of a curve's own points, evenly spread along its length, both ends among them."""
    if len(curve.fpr) <= points:
        return curve
    walked = curve.fpr + curve.tpr  # both only grow, so that this is the way along the staircase
    kept = np.unique(np.searchsorted(walked, np.linspace(0, walked[-1], points - 1)))
    kept = np.union1d(kept, [0, len(walked) - 1])
    return Curve(curve.label, curve.fold, curve.fpr[kept], curve.tpr[kept], curve.threshold[kept])


def precision_recall_curves(scored: Scored, points: int = CURVE_POINTS) -> list[PrecisionRecall]:
    """For each label that has both classes: at most `points` of the curve's own, evenly spread in recall."""
    curves = []
    for label, name in enumerate(LABELS):
        _, truth, probability = scored.of(label)
        if has_both(truth):
            precision, recall, _ = precision_recall_curve(truth, probability)
            precision, recall = precision[::-1], recall[::-1]
            kept = np.unique(np.searchsorted(recall, np.linspace(0, 1, points)))
            curves.append(PrecisionRecall(name, recall[kept], precision[kept]))
    return curves


def reliabilities(judged: Sequence[Judged]) -> dict[str, tuple[Reliability, Reliability | None]]:
    """By label: reliability as predicted, and after temperature scaling."""
    return {
        LABELS[one.label]: (
            reliability(one.truth, one.probability),
            reliability(one.truth, one.scaled.probability) if one.scaled else None,
        )
        for one in judged
    }


def curve_table(curves: dict[str, list[Curve]]) -> pd.DataFrame:
    """The ROC curves as rows: level, label, fold (a number, or "all"), fpr, tpr."""
    rows = [
        pd.DataFrame({"level": level, "label": curve.label, "fold": curve.fold, "fpr": curve.fpr, "tpr": curve.tpr})
        for level, of_level in curves.items()
        for curve in of_level
    ]
    empty = pd.DataFrame(columns=["level", "label", "fold", "fpr", "tpr"])
    return pd.concat(rows, ignore_index=True).round(DECIMALS) if rows else empty


def precision_recall_table(curves: dict[str, list[PrecisionRecall]]) -> pd.DataFrame:
    """The precision-recall curves as rows: level, label, recall, precision."""
    rows = [
        pd.DataFrame({"level": level, "label": curve.label, "recall": curve.recall, "precision": curve.precision})
        for level, of_level in curves.items()
        for curve in of_level
    ]
    empty = pd.DataFrame(columns=["level", "label", "recall", "precision"])
    return pd.concat(rows, ignore_index=True).round(DECIMALS) if rows else empty


def reliability_table(found: dict[str, dict[str, tuple[Reliability, Reliability | None]]]) -> pd.DataFrame:
    """The reliability diagrams as rows: level, label, probabilities (predicted, scaled), rows, predicted, observed."""
    tables = [
        pd.DataFrame(
            {
                "level": level,
                "label": label,
                "probabilities": name,
                "rows": one.rows,
                "predicted": one.predicted,
                "observed": one.observed,
            }
        )
        for level, of_level in found.items()
        for label, pair in of_level.items()
        for name, one in zip(("predicted", "scaled"), pair, strict=True)
        if one is not None
    ]
    return pd.concat(tables, ignore_index=True).round(DECIMALS)
