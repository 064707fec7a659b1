"""Scores on plain arrays, for each label, at slice and at study level, each beside what guessing would score.

Nothing that is fitted is scored on what it was fitted to: thresholds and temperatures come from other patients' rows.

Axes: N rows (slices at slice level, studies at study level), L labels. A label of −1 is unknown and left out of every
figure. A figure that the data cannot give (one class only, too few positive patients) is None, never NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pipeline.bootstrap import AtPrevalence, Gaps, Ranked, Ratios, Statistic, interval, pivotal_interval
from pipeline.calibration import find_bins, reliability
from pipeline.held_out import Bools, Floats, Judged, Scored, has_both
from pipeline.labels import ANY, LABEL_WEIGHTS, LABELS, UNKNOWN

DECIMALS = 6
"""Of figures that are written: more than any cohort supports, few enough to read."""

SMALLEST_PROBABILITY = 1e-15
"""The challenge clips probabilities here; in float32 one minus it would be one, so the sums are made in float64."""

WHOLE = "whole"
"""Stands for a label where a figure is of all labels at once."""

AVERAGED = ("auc", "average_precision", "sensitivity", "specificity", "log_loss", "base_rate_log_loss", "brier", "ece")

SPECIFICITIES = (90, 95)
"""Per cent; at each the highest sensitivity is read off the ROC curve."""

RATES = ("sensitivity", "specificity", "ppv", "npv", "f1", "accuracy")
"""Of calls; each is a sum over rows by another."""

CALIBRATION_ERRORS = ("ece", "ece_scaled")
"""Too high by chance, never too low; their intervals allow for it."""


def score(scored: Scored, judged: Sequence[Judged], *, prevalence: float) -> dict[str, Any]:
    """Every figure of one level.

    Args:
        scored: the rows.
        judged: what `judge` makes of them.
        prevalence: share of studies with hemorrhage for which PPV and NPV are given as well.

    Returns:
        One entry a label, then `macro` (the mean over the labels that have the figure), the AUC of all labels' rows taken
        together, the weighted multi-label log loss (also after temperature scaling), and the same for someone who predicts
        each label's prevalence.
    """
    weights_N = to_prevalence(scored, prevalence)
    by_label = {LABELS[one.label]: score_label(scored, one, weights_N=weights_N) for one in judged}
    known_NL = scored.labels_NL != UNKNOWN
    return {
        **by_label,
        "macro": _macro(list(by_label.values())),
        "micro_auc": auc(scored.labels_NL[known_NL] == 1, scored.probabilities_NL[known_NL]),
        "weighted_log_loss": weighted_log_loss(scored.labels_NL, scored.probabilities_NL),
        "weighted_log_loss_scaled": weighted_log_loss(scored.labels_NL, _scaled_probabilities(scored, judged)),
        "base_rate_weighted_log_loss": weighted_log_loss(scored.labels_NL, base_rates(scored.labels_NL)),
    }


def score_label(scored: Scored, judged: Judged, *, weights_N: Floats | None) -> dict[str, Any]:
    """The figures of one label, with the number of positives that they rest on."""
    known_N, truth, probability = judged.known_N, judged.truth, judged.probability
    called = judged.decisions.called if judged.decisions else None
    return {
        "positives": int(truth.sum()),
        "negatives": int((~truth).sum()),
        "positive_studies": len(np.unique(scored.study_N[known_N][truth])),
        "positive_patients": len(np.unique(scored.patient_N[known_N][truth].astype(str))),
        "auc": auc(truth, probability),
        "average_precision": average_precision(truth, probability),
        **{f"sensitivity_at_{at}": sensitivity_at(truth, probability, at / 100) for at in SPECIFICITIES},
        **dict.fromkeys((*RATES, "log_loss_scaled", "brier_scaled")),
        **{name: _ratio(*parts) for name, parts in judged_parts(judged).items()},
        **_at_prevalence(judged, weights_N),
        "confusion": _confusion(truth, called),
        "thresholds": list(judged.decisions.thresholds) if judged.decisions else None,
        "base_rate_log_loss": log_loss(truth, np.full(len(truth), truth.mean() if len(truth) else 0.0)),
        **_calibration(judged),
        "auc_by_fold": {
            str(fold): auc(truth[here], probability[here])
            for fold in np.unique(scored.fold_N)
            for here in [scored.fold_N[known_N] == fold]
        },
    }


def judged_parts(judged: Judged) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The figures that are a sum over rows by another: numerator and denominator of each row, [known]."""
    truth, probability = judged.truth, judged.probability
    one = np.ones(len(truth))
    parts = {
        "log_loss": (losses(truth, probability), one),
        "brier": ((probability - truth) ** 2, one),
    }
    if judged.scaled is not None:
        after = judged.scaled.probability
        parts |= {"log_loss_scaled": (losses(truth, after), one), "brier_scaled": ((after - truth) ** 2, one)}
    if judged.decisions is None:
        return parts
    called = judged.decisions.called
    hit, either = truth & called, truth.astype(np.int64) + called
    return parts | {
        "sensitivity": (hit, truth),
        "specificity": (~truth & ~called, ~truth),
        "ppv": (hit, called),
        "npv": (~truth & ~called, ~called),
        "f1": (2 * hit, either),
        "accuracy": (truth == called, one),
    }


def prevalence_parts(judged: Judged) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """As `judged_parts`: the figures that depend on how many studies have hemorrhage; none without calls."""
    if judged.decisions is None:
        return {}
    truth, called = judged.truth, judged.decisions.called
    return {"ppv_at_prevalence": (truth & called, called), "npv_at_prevalence": (~truth & ~called, ~called)}


def _ratio(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> float | None:
    return float(numerator.sum() / denominator.sum()) if denominator.any() else None


def _confusion(truth: Bools, called: Bools | None) -> dict[str, int] | None:
    if called is None:
        return None
    return {
        "found": int((truth & called).sum()),
        "missed": int((truth & ~called).sum()),
        "false_alarms": int((~truth & called).sum()),
        "rightly_free": int((~truth & ~called).sum()),
    }


def to_prevalence(scored: Scored, prevalence: float) -> Floats | None:
    """Weights of rows that make studies with hemorrhage as frequent as `prevalence`, and change nothing else.

    All rows of a study weigh the same, so that slices and subtypes follow from the mix of studies. A study that nobody knows
    about weighs nothing.

    Returns:
        float64 [N], or None if all studies are positive or all negative.
    """
    any_S, _, row = _any_of_studies(scored)
    positive, known = int((any_S == 1).sum()), int((any_S != UNKNOWN).sum())
    if positive in (0, known):
        return None
    weights_S = np.where(any_S == 1, prevalence / positive, (1 - prevalence) / (known - positive))
    return np.where(any_S == UNKNOWN, 0.0, weights_S)[row]


def _any_of_studies(scored: Scored) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each study's `any`, int8 [S]; the first of its rows, int64 [S]; and each row's study, int64 [N]."""
    study, first, row = np.unique(scored.study_N, return_index=True, return_inverse=True)
    any_S = np.full(len(study), UNKNOWN, np.int8)
    np.maximum.at(any_S, row, scored.labels_NL[:, ANY])
    return any_S, first, row


def _at_prevalence(judged: Judged, weights_N: Floats | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {"ppv_at_prevalence": None, "npv_at_prevalence": None}
    if weights_N is None:
        return found
    weights = weights_N[judged.known_N]
    parts = prevalence_parts(judged)
    return found | {name: _ratio(weights * upper, weights * lower) for name, (upper, lower) in parts.items()}


def _calibration(judged: Judged) -> dict[str, Any]:
    """Expected calibration error, and what temperature scaling makes of it."""
    truth, scaled = judged.truth, judged.scaled
    after = scaled.probability if scaled else None
    return {
        "ece": reliability(truth, judged.probability).error,
        "ece_scaled": None if after is None else reliability(truth, after).error,
        "temperatures": list(scaled.temperatures) if scaled else None,
    }


def _scaled_probabilities(scored: Scored, judged: Sequence[Judged]) -> Floats:
    """After scaling, float64 [N, L]; a label that could not be scaled stands as it was."""
    probabilities_NL = scored.probabilities_NL.copy()
    for one in judged:
        if one.scaled is not None:
            probabilities_NL[one.known_N, one.label] = one.scaled.probability
    return probabilities_NL


def statistics(
    scored: Scored, judged: Sequence[Judged], *, patients: Sequence[str], prevalence: float
) -> dict[str, Statistic]:
    """What the bootstrap draws: by label (and `WHOLE`), then "/ranks", "/sums", "/gaps" or "/mix".

    Args:
        scored: the rows.
        judged: what `judge` makes of them.
        patients: sorted keys of all who may be drawn.
        prevalence: as for `score`.
    """
    patient_N, known_NL = number_patients(scored, patients), scored.labels_NL != UNKNOWN
    any_S, first_S, row_N = _any_of_studies(scored)
    studies_P2 = np.stack([np.bincount(patient_N[first_S], any_S == kind, len(patients)) for kind in (0, 1)], axis=1)
    found: dict[str, Statistic] = {}
    for one in judged:
        name, of_known = LABELS[one.label], patient_N[one.known_N]
        found[f"{name}/ranks"] = Ranked(one.truth, one.probability, patient_N=of_known, specificities=SPECIFICITIES)
        found[f"{name}/sums"] = Ratios(judged_parts(one), patient_N=of_known, patients=len(patients))
        found[f"{name}/gaps"] = Gaps(_gap_parts(one), patient_N=of_known, patients=len(patients))
        if one.decisions is not None:
            found[f"{name}/mix"] = AtPrevalence(
                prevalence_parts(one),
                in_positive_N=any_S[row_N][one.known_N],
                studies_P2=studies_P2,
                prevalence=prevalence,
                patient_N=of_known,
            )
    micro = (scored.labels_NL[known_NL] == 1, scored.probabilities_NL[known_NL])
    found[f"{WHOLE}/ranks"] = Ranked(*micro, patient_N=patient_N[np.nonzero(known_NL)[0]])
    found[f"{WHOLE}/sums"] = Ratios(_weighted_parts(scored, judged), patient_N=patient_N, patients=len(patients))
    return found


def _gap_parts(judged: Judged) -> dict[str, tuple[Floats, npt.NDArray[np.int64]]]:
    said = {"ece": judged.probability}
    if judged.scaled is not None:
        said["ece_scaled"] = judged.scaled.probability
    return {name: (judged.truth - probability, find_bins(probability)) for name, probability in said.items()}


def _weighted_parts(scored: Scored, judged: Sequence[Judged]) -> dict[str, tuple[Floats, Floats]]:
    said = {
        "weighted_log_loss": scored.probabilities_NL,
        "weighted_log_loss_scaled": _scaled_probabilities(scored, judged),
    }
    parts = {name: _weighted(scored.labels_NL, probabilities_NL) for name, probabilities_NL in said.items()}
    return {name: (losses_NL.sum(axis=1), weights_NL.sum(axis=1)) for name, (losses_NL, weights_NL) in parts.items()}


def number_patients(scored: Scored, patients: Sequence[str]) -> npt.NDArray[np.int64]:
    """Each row's patient as a number among the sorted keys: int64 [N]."""
    return np.searchsorted(np.asarray(patients, str), scored.patient_N.astype(str)).astype(np.int64)


def with_intervals(scores: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    """One level's scores with `<figure>_ci`, [low, high], behind each figure that was drawn.

    Args:
        scores: what `score` gives.
        drawn: what `resample` makes of `statistics`.
    """
    by_label = {name: _of_label(drawn, name) for name in LABELS}
    labels = {name: _beside(scores[name], by_label[name]) for name in LABELS}
    macro = _beside(scores["macro"], _mean_draws(scores, by_label))
    whole = {**drawn[f"{WHOLE}/sums"], "micro_auc": drawn[f"{WHOLE}/ranks"]["auc"]}
    return _beside({**scores, **labels, "macro": macro}, whole)


def _of_label(drawn: Mapping[str, Mapping[str, Floats]], label: str) -> dict[str, Floats]:
    return {name: values for key, of in drawn.items() if key.split("/")[0] == label for name, values in of.items()}


def _mean_draws(scores: Mapping[str, Any], by_label: Mapping[str, Mapping[str, Floats]]) -> dict[str, Floats]:
    """Each draw's mean over the labels that have the figure."""
    found = {}
    for name in AVERAGED:
        of = [drawn[name] for label, drawn in by_label.items() if name in drawn and scores[label][name] is not None]
        if of:
            found[name] = np.mean(of, axis=0)
    return found


def _beside(figures: Mapping[str, Any], drawn: Mapping[str, Floats]) -> dict[str, Any]:
    found = {}
    for name, value in figures.items():
        found[name] = value
        if name in drawn:
            found[f"{name}_ci"] = None if value is None else _ends(name, value, drawn[name])
    return found


def _ends(name: str, figure: float, values_D: Floats) -> list[float] | None:
    return pivotal_interval(values_D, figure) if name in CALIBRATION_ERRORS else interval(values_D)


def _macro(by_label: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {name: [figures[name] for figures in by_label if figures[name] is not None] for name in AVERAGED}
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return {"labels": len(found["auc"]), **means}


def auc(truth: Bools, probability: npt.NDArray[Any], weights: Floats | None = None) -> float | None:
    """Area under the ROC curve, of rows that may weigh; None with one class only, or if none of a class weighs anything."""
    if weights is not None:
        truth, probability, weights = truth[weights > 0], probability[weights > 0], weights[weights > 0]
    return float(roc_auc_score(truth, probability, sample_weight=weights)) if has_both(truth) else None


def average_precision(truth: Bools, probability: Floats) -> float | None:
    """Average precision; None with one class only."""
    return float(average_precision_score(truth, probability)) if has_both(truth) else None


def sensitivity_at(truth: Bools, probability: Floats, specificity: float) -> float | None:
    """The highest sensitivity whose specificity is at least this, on the ROC curve of these rows; None with one class only."""
    if not has_both(truth):
        return None
    fpr, tpr, _ = roc_curve(truth, probability, drop_intermediate=False)
    return float(tpr[fpr <= 1 - specificity + 1e-12].max())  # 1 − 0.9 is a little less than 0.1


def log_loss(truth: Bools, probability: Floats) -> float | None:
    """Mean log loss of one label, probabilities clipped as the challenge does; None without rows."""
    return float(losses(truth, probability).mean()) if len(truth) else None


def weighted_log_loss(labels_NL: npt.NDArray[np.int8], probabilities_NL: Floats) -> float | None:
    """The challenge's metric: `any` counts twice, the mean is over the weights of what is known; None if nothing is."""
    losses_NL, weights_NL = _weighted(labels_NL, probabilities_NL)
    return _ratio(losses_NL, weights_NL)


def _weighted(labels_NL: npt.NDArray[np.int8], probabilities_NL: Floats) -> tuple[Floats, Floats]:
    """Each label's loss times its weight, and the weight, 0 where the label is unknown: float64 [N, L] both."""
    weights_NL = np.where(labels_NL != UNKNOWN, np.array(LABEL_WEIGHTS), 0.0)
    return weights_NL * losses(labels_NL == 1, probabilities_NL), weights_NL


def losses(truth: Bools, probability: Floats) -> Floats:
    """Each row's log loss, probabilities clipped as the challenge does."""
    clipped = np.clip(np.asarray(probability, np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return -np.where(truth, np.log(clipped), np.log1p(-clipped))


def base_rates(labels_NL: npt.NDArray[np.int8]) -> Floats:
    """Each label's prevalence among the rows that know it, repeated for every row: float64 [N, L]."""
    known_NL = labels_NL != UNKNOWN
    rates_L = (labels_NL == 1).sum(axis=0) / np.maximum(known_NL.sum(axis=0), 1)
    return np.broadcast_to(rates_L, labels_NL.shape).astype(np.float64)


def score_stratum(scored: Scored, judged: Judged, inside_N: Bools) -> dict[str, Any]:
    """One label's figures on some rows only, at the thresholds of all."""
    inside = inside_N[judged.known_N]
    truth, probability = judged.truth[inside], judged.probability[inside]
    called = judged.decisions.called[inside] if judged.decisions else None
    return {
        "rows": int(inside.sum()),
        "positives": int(truth.sum()),
        "patients": len(np.unique(scored.patient_N[judged.known_N][inside].astype(str))),
        "auc": auc(truth, probability),
        "log_loss": log_loss(truth, probability),
        "sensitivity": None if called is None else _ratio(truth & called, truth),
        "specificity": None if called is None else _ratio(~truth & ~called, ~truth),
    }


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
